"""Attention router of Yuan 2.0-M32: an expert's logit depends on all experts, by attention with heads of width 1.

    q = x W_query,  k = x W_key,  v = x W_value                     each float32 [E] per token
    z_i = sum_j softmax_j(q_i k_j) v_j                              no factor 1 / sqrt(width): it is 1
    chosen = top-K of  stop_gradient(softmax(z)) + bias,    w = softmax(z_chosen)

So min(v) <= z_i <= max(v), and all experts tie where q or k is 0: with small initial weights the spread of z is a
small part of that of v, and tiny differences decide. That is why everything is float32 and `init_std` is not smaller.
The probabilities handed to the balance rules are softmax(z), never the attention.

Memory: S * E^2 floats a sequence while it runs; they are recomputed for the gradient, not kept.
Gradient: through `weight`, `probs` and `log_z`. Collectives: none. Parameters: 3 D E.
Source: Wu et al. 2024 (arXiv 2405.17976, section 3.2) and the training code (IEIT-Yuan/Yuan2.0-M32), whose weights are
the softmax over the chosen logits.
Differs from the paper: three matrices instead of one fused projection; an expert bias is accepted, where the paper
trains without any balancing.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.config import at_least
from moe.routing.base import EXACT, EXPERT_AXIS, SAVED_NAME, Context, Router, Routing, TokenChoiceConfig
from moe.routing.choice import token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class YuanConfig(TokenChoiceConfig):
    """Attention between experts decides."""

    init_std: float = 0.02
    """Standard deviation of the three initial matrices."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, init_std=0)
        if self.num_selected < 2:
            yield "num_selected", "must be at least 2: the one weight would be 1 and the router never learn"

    def build(self, key: jax.Array, width: int, num_experts: int) -> "AttentionRouter":
        return AttentionRouter(self, key, width, num_experts)


class AttentionRouter(Router):
    """x [B, S, D] any float dtype -> `Routing` with K assignments a token."""

    def __init__(self, config: YuanConfig, key: jax.Array, width: int, num_experts: int):
        self.num_selected = config.num_selected
        query, key_key, value = jax.random.split(key, 3)
        shape, names = (width, num_experts), ("embed", EXPERT_AXIS)
        self.w_query = param.normal(query, shape, names, config.init_std)
        self.w_key = param.normal(key_key, shape, names, config.init_std)
        self.w_value = param.normal(value, shape, names, config.init_std)

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """z, float32 [B, S, E]."""
        x_BSD = x_BSD.astype(jnp.float32)
        weights = (self.w_query, self.w_key, self.w_value)
        q, k, v = (jnp.einsum("bsd,de->bse", x_BSD, w[...], precision=EXACT) for w in weights)
        return checkpoint_name(_attend(q, k, v), SAVED_NAME)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        logits_BSE = self.logits(x_BSD)
        probs_BSE = jax.nn.softmax(logits_BSE, axis=-1)
        select_BSE = probs_BSE + bias_E
        expert_BSK, margin_BS = top_k(select_BSE, self.num_selected)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=jax.nn.softmax(jnp.take_along_axis(logits_BSE, expert_BSK, axis=-1), axis=-1),
            probs_BSE=probs_BSE,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=margin_BS,
            select_BSE=select_BSE,
        )


@jax.checkpoint
def _attend(q_BSE: jax.Array, k_BSE: jax.Array, v_BSE: jax.Array) -> jax.Array:
    share_BSEj = jax.nn.softmax(q_BSE[..., :, None] * k_BSE[..., None, :], axis=-1)
    return jnp.einsum("bsej,bsj->bse", share_BSEj, v_BSE, precision=EXACT)
