"""The dispatch contract: who is computed. `moe.dispatch.exchange` says how rows travel where experts are elsewhere."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.dispatch.rows import places, put, take
from moe.kernels.grouped import Kernel, layout, permute
from moe.routing.base import Routing


class ExpertWeights(NamedTuple):
    """Stacked gated MLPs in the compute dtype."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Assignments(NamedTuple):
    """R assignments of T tokens without a batch: of one device, or of rows that arrived at one."""

    token_R: jax.Array
    """int32 in [0, T)."""
    expert_R: jax.Array
    """int32 among the experts held; their number marks a void assignment."""
    weight_R: jax.Array
    """float32 combine weight."""
    num_selected: int | None
    """K if token_R is [0]*K + [1]*K + ..., else None."""


def assignments(routing: Routing, num_positions: int) -> Assignments:
    """Those of all sequences, tokens counted through: token s of sequence b is b S + s."""
    first_B = num_positions * jnp.arange(routing.token_BR.shape[0], dtype=jnp.int32)
    token_R = (routing.token_BR + first_B[:, None]).reshape(-1)
    return Assignments(token_R, routing.expert_BR.reshape(-1), routing.weight_BR.reshape(-1), routing.num_selected)


def stacked(x_NbD: jax.Array, w_NDF: jax.Array) -> jax.Array:
    """N products of b rows with a matrix each."""
    return jnp.einsum("nbd,ndf->nbf", x_NbD, w_NDF)


def expert_mlp(
    x: jax.Array,
    weight: jax.Array,
    w: ExpertWeights,
    dot: Callable[[jax.Array, jax.Array], jax.Array] = stacked,
) -> jax.Array:
    """y = (weight * silu(x W_gate) * (x W_up)) W_down, `dot` being the product of rows and stacked matrices.

    The combine weight acts before the down projection: nothing of the size of the output is kept for its gradient.
    """
    with jax.named_scope("experts"):
        hidden = jax.nn.silu(dot(x, w.gate_EDF)) * dot(x, w.up_EDF)
        return dot(hidden * weight[..., None].astype(hidden.dtype), w.down_EFD)


def grouped_mlp(x_TD: jax.Array, a: Assignments, w: ExpertWeights, bound: int, kernel: Kernel = "auto") -> jax.Array:
    """y [T, D]: every token's sum over its assignments, of which at most `bound` are not void, by grouped products."""
    slots = layout(a.expert_R, w.gate_EDF.shape[0], bound, kernel)
    at = places(a.token_R, slots.assignment_N, slots.slot_R, x_TD.shape[0], a.num_selected)
    weight_N = permute(a.weight_R, slots.assignment_N, slots.slot_R)
    return put(expert_mlp(take(x_TD, at), weight_N, w, slots.dot), at, x_TD.shape[0])


class Dispatcher:
    """Decides who is computed, and computes it on one device.

    x [B, S, D], routing with assignments [B, R], weights of E experts -> y [B, S, D] and dropped [B] int32. An
    assignment to expert E is void. y is the sum over the token's assignments of weight * expert(x). The call is
    `select` and then `compute`; over a mesh rows travel in between.
    """

    def __call__(self, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
        B, S, D = x_BSD.shape
        routing, dropped_B = self.select(routing)
        y_TD = self.compute(x_BSD.reshape(B * S, D), assignments(routing, S), weights, routing.expert_BR.size)
        return y_TD.reshape(x_BSD.shape), dropped_B

    def select(self, routing: Routing) -> tuple[Routing, jax.Array]:
        """The routing with dropped assignments made void, and how many were, int32 [B]: per sequence, on any mesh."""
        return routing, jnp.zeros(routing.expert_BR.shape[:1], jnp.int32)

    def compute(self, x_TD: jax.Array, a: Assignments, weights: ExpertWeights, bound: int) -> jax.Array:
        """y [T, D] in the dtype of x, exactly; at most `bound` assignments are not void."""
        raise NotImplementedError(f"{type(self).__name__} must define compute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """Base of every dispatcher's config; its type selects the dispatcher."""

    @property
    def uses_priority(self) -> bool:
        """Whether the router's priority decides who stays when a buffer overflows."""
        return False

    def at_capacity(self, capacity: float) -> "DispatchConfig":
        """The same with buffers of `capacity` times the balanced load; itself if it has none of a fixed size."""
        return self

    def need(self, routing: Routing) -> jax.Array | None:
        """float32 [B] the capacity with which nothing of a sequence would be dropped; None: it never drops."""
        return None

    def build(self) -> Dispatcher:
        raise NotImplementedError(f"{type(self).__name__} must define build")
