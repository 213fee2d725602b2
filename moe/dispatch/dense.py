"""Dense dispatch: every token through every expert, weighted by 0 where it was not assigned.

The oracle: E / K times the work, nothing to go wrong. Exact, drops nothing. Collectives: none.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.dispatch.base import Assignments, DispatchConfig, Dispatcher, ExpertWeights, expert_mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(DispatchConfig):
    """Every token through every expert (the oracle)."""

    def build(self) -> Dispatcher:
        return Dense()


class Dense(Dispatcher):
    """See the head of this file."""

    def compute(self, x_TD: jax.Array, a: Assignments, weights: ExpertWeights, bound: int) -> jax.Array:
        T, D = x_TD.shape
        E = weights.gate_EDF.shape[0]
        # [T, E] combine weights; mode="drop" because void assignments name an expert out of range.
        combine_TE = jnp.zeros((T, E)).at[a.token_R, a.expert_R].add(a.weight_R, mode="drop")
        y_ETD = expert_mlp(jnp.broadcast_to(x_TD, (E, T, D)), combine_TE.T, weights)
        return y_ETD.sum(axis=0).astype(x_TD.dtype)
