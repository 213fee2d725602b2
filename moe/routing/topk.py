"""Top-k token choice: every token takes the K experts it scores highest.

    z = x W_router                            (float32 whatever the compute dtype)
    s = softmax(z)  or  sigmoid(z)
    chosen = top-K of  stop_gradient(s) + bias
    w = s_chosen | s_chosen / sum(s_chosen) | softmax(z_chosen),   times `scale`

The expert bias moves the selection and never the weight. The probabilities handed to the balance rules are softmax(z),
or s / sum(s) for sigmoid scores, computed as softmax(log s): no epsilon, so pushing all scores towards 0 cannot escape
the balance loss (with an epsilon in the denominator it can).

Gradient: through `weight`, `probs` and `log_z`; the selection carries none. Collectives: none.
Source: Shazeer et al. 2017 (arXiv 1701.06538, section 2.1) for top-k then softmax; Fedus et al. 2021 (arXiv
2101.03961, eq. 1-2) for softmax then top-k; DeepSeek-V3 (arXiv 2412.19437, eq. 13-16) for sigmoid scores and bias.
Differs from the paper: DeepSeek-V3's group-limited selection is not here. Dividing softmax scores by their sum is the
same function as the softmax of the chosen logits; both are kept because configurations name either.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.config import at_least
from moe.routing.base import Context, Router, RouterConfig, Routing, void_padding

SAVED_NAME = "router"
"""Checkpoint name of router outputs: every remat policy keeps them, so a recomputed layer cannot pick other experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """Top-k token choice."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    normalise: Literal["none", "sum", "softmax"] = "none"
    """Combine weights: the scores as they are, divided by their sum over the K, or softmax over the K logits."""
    scale: float = 1.0
    """Factor on the combine weights (DeepSeek-V3: 2.5)."""
    init_std: float = 0.02
    """Standard deviation of the router's initial weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_selected=1)
        if self.score == "sigmoid" and self.normalise == "softmax":
            yield "normalise", "softmax over the chosen logits ignores score='sigmoid'; use 'sum' or 'none'"
        if self.num_selected == 1 and self.normalise != "none":
            yield "normalise", "must be 'none' when num_selected is 1: the weight would be 1 and the router never learn"
        if not self.scale > 0:
            yield "scale", "must be greater than 0"
        if not self.init_std >= 0:
            yield "init_std", "must be at least 0"

    def build(self, key: jax.Array, width: int, num_experts: int) -> "TopK":
        return TopK(self, key, width, num_experts)


class TopK(Router):
    """x [B, S, D] any float dtype -> Routing with R = S * K."""

    def __init__(self, config: TopKConfig, key: jax.Array, width: int, num_experts: int):
        self.config = config
        self.w_router = param.normal(key, (width, num_experts), ("embed", "router_experts"), config.init_std)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        config = self.config
        K, E = config.num_selected, self.w_router.shape[-1]
        w = self.w_router[...]
        logits_BSE = checkpoint_name(jnp.einsum("bsd,de->bse", x_BSD.astype(jnp.float32), w), SAVED_NAME)
        log_z_BS = jax.nn.logsumexp(logits_BSE, axis=-1)
        log_scores_BSE = (
            jax.nn.log_sigmoid(logits_BSE) if config.score == "sigmoid" else logits_BSE - log_z_BS[..., None]
        )
        probs_BSE = jax.nn.softmax(log_scores_BSE, axis=-1)

        select_BSE = jax.lax.stop_gradient(jnp.exp(log_scores_BSE)) + bias_E
        best, expert_BSk = jax.lax.top_k(select_BSE, min(K + 1, E))
        margin_BS = best[..., K - 1] - best[..., K] if E > K else jnp.full(log_z_BS.shape, jnp.inf)
        expert_BSK = checkpoint_name(expert_BSk[..., :K], SAVED_NAME)

        chosen_BSK = jnp.take_along_axis(log_scores_BSE, expert_BSK, axis=-1)
        weight_BSK = jnp.exp(chosen_BSK) if config.normalise == "none" else jax.nn.softmax(chosen_BSK, axis=-1)
        mask_BS = context.mask_BS
        return Routing(
            **void_padding(mask_BS, E, expert_BSK, config.scale * weight_BSK),
            probs_BSE=jnp.where(mask_BS[..., None], probs_BSE, 0.0),
            log_z_BS=jnp.where(mask_BS, log_z_BS, 0.0),
            margin_BS=jnp.where(mask_BS, margin_BS, jnp.inf),
        )
