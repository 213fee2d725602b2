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

from moe.routing.base import Context, LinearRouterConfig, Routing
from moe.routing.choice import token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig(LinearRouterConfig):
    """Top-k token choice."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    normalise: Literal["none", "sum", "softmax"] = "none"
    """Combine weights: the scores as they are, divided by their sum over the K, or softmax over the K logits."""
    scale: float = 1.0
    """Factor on the combine weights (DeepSeek-V3: 2.5)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.score == "sigmoid" and self.normalise == "softmax":
            yield "normalise", "softmax over the chosen logits ignores score='sigmoid'; use 'sum' or 'none'"
        if self.num_selected == 1 and self.normalise != "none":
            yield "normalise", "must be 'none' when num_selected is 1: the weight would be 1 and the router never learn"
        if not self.scale > 0:
            yield "scale", "must be greater than 0"

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        log_z_BS = jax.nn.logsumexp(logits_BSE, axis=-1)
        log_scores_BSE = jax.nn.log_sigmoid(logits_BSE) if self.score == "sigmoid" else logits_BSE - log_z_BS[..., None]
        expert_BSK, margin_BS = top_k(jnp.exp(log_scores_BSE) + bias_E, self.num_selected)
        chosen_BSK = jnp.take_along_axis(log_scores_BSE, expert_BSK, axis=-1)
        weight_BSK = jnp.exp(chosen_BSK) if self.normalise == "none" else jax.nn.softmax(chosen_BSK, axis=-1)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=self.scale * weight_BSK,
            probs_BSE=jax.nn.softmax(log_scores_BSE, axis=-1),
            log_z_BS=log_z_BS,
            margin_BS=margin_BS,
        )
