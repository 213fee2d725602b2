"""Dense dispatch: every token through every expert, weighted by 0 where it was not assigned.

The oracle: E / K times the work, nothing to go wrong. Exact, drops nothing. Collectives: none.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.dispatch.base import DispatchConfig, Dispatcher, ExpertWeights, expert_mlp
from moe.routing.base import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(DispatchConfig):
    """Every token through every expert (the oracle)."""

    def build(self) -> Dispatcher:
        return dense


def dense(x_BSD: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
    B, S, D = x_BSD.shape
    E = weights.gate_EDF.shape[0]
    # [B, S, E] combine weights; mode="drop" because void assignments name an expert out of range.
    combine_BSE = jax.vmap(
        lambda token_R, expert_R, weight_R: jnp.zeros((S, E)).at[token_R, expert_R].add(weight_R, mode="drop")
    )(routing.token_BR, routing.expert_BR, routing.weight_BR)
    x_ETD = jnp.broadcast_to(x_BSD.reshape(1, B * S, D), (E, B * S, D))
    y_ETD = expert_mlp(x_ETD, combine_BSE.reshape(B * S, E).T, weights)
    return y_ETD.sum(axis=0).reshape(B, S, D).astype(x_BSD.dtype), jnp.zeros((B,), jnp.int32)
