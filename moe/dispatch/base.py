"""The dispatch contract: (tokens, assignments, expert weights) -> outputs and how many assignments were dropped."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe.routing.base import Routing


class ExpertWeights(NamedTuple):
    """Stacked gated MLPs in the compute dtype."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array

    def take(self, expert_N: jax.Array) -> "ExpertWeights":
        """The weights of these experts, repeated as often as they are named."""
        return ExpertWeights(*(w[expert_N] for w in self))


def expert_mlp(x_NbD: jax.Array, weight_Nb: jax.Array, w: ExpertWeights) -> jax.Array:
    """y = (weight * silu(x W_gate) * (x W_up)) W_down for N stacks of b rows.

    The combine weight acts before the down projection: nothing of the size of the output is kept for its gradient.
    """
    with jax.named_scope("experts"):
        gate_NbF = jnp.einsum("nbd,ndf->nbf", x_NbD, w.gate_EDF)
        hidden_NbF = jax.nn.silu(gate_NbF) * jnp.einsum("nbd,ndf->nbf", x_NbD, w.up_EDF)
        hidden_NbF = hidden_NbF * weight_Nb[..., None].astype(hidden_NbF.dtype)
        return jnp.einsum("nbf,nfd->nbd", hidden_NbF, w.down_EFD)


class Dispatcher(Protocol):
    """Pure function of what lies on one device; `moe.dispatch.sharded` runs it over a mesh.

    x [B, S, D], routing with assignments [B, R], weights of E experts -> y [B, S, D] and dropped [B] int32. An
    assignment to expert E is void. y is the sum over the token's assignments of weight * expert(x).
    """

    def __call__(self, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """Base of every dispatcher's config; its type selects the dispatcher."""

    @property
    def uses_priority(self) -> bool:
        """Whether the router's priority decides who stays when a buffer overflows."""
        return False

    def build(self) -> Dispatcher:
        raise NotImplementedError(f"{type(self).__name__} must define build")
