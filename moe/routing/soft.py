"""Soft routing: every token runs through every expert, weighted by a softmax.

    z = x W_router          (float32)
    y_s = sum_e softmax(z)_se expert_e(x_s)

Nothing is selected: K = E, the margin is +inf, the expert bias is not used, and the load is uniform whatever the router
does. The cost is that of E experts. With identical experts the layer is one expert, exactly, whatever the weights.

Gradient: through `weight`, `probs` and `log_z`. Collectives: none.
Source: BAM (Zhang et al. 2024, arXiv 2408.08274) routes its attention experts so; its ablation finds soft routing
better than top-1 or top-2 there.
Differs from the paper: there the experts are attention, here they are MLPs.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe.routing.base import Context, LinearScoresConfig, Routing
from moe.routing.choice import token_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftConfig(LinearScoresConfig):
    """Every expert, weighted by a softmax; costs E experts a token."""

    uses_bias: ClassVar[bool] = False

    def experts_per_token(self, num_experts: int) -> float:
        return num_experts

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        E = logits_BSE.shape[-1]
        probs_BSE = jax.nn.softmax(logits_BSE, axis=-1)
        return token_choice(
            context,
            expert_BSK=jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), logits_BSE.shape),
            weight_BSK=probs_BSE,
            probs_BSE=probs_BSE,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=jnp.full(logits_BSE.shape[:2], jnp.inf),
        )
