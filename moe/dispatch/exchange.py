"""How rows travel to the devices that hold their experts and back: the contract, and the ring of experts.

A device holds T tokens of its own and their R assignments, E / n of the experts (n devices of the axis `expert`), and a
slice of those experts' hidden width (axis `expert_tensor`). An exchange brings rows to experts, has them computed, and
adds the results up at the tokens. What is computed is the dispatcher's; an exchange without a budget changes no number.

    balanced rows of a device = R        (n devices send R each, n hold the experts)

`RingConfig` is exact and simple: all tokens of the n devices are gathered at each, which computes what is assigned to
its experts, and the partial sums are scattered back. It sends T n rows each way whatever K is, and reserves n R rows.

Collectives, forward: all-gather(x, assignments; expert and expert_tensor), reduce-scatter(y; the same).
Differs from a ring: XLA's all-gather and reduce-scatter, not a loop of neighbours.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.axes import EXPERT, EXPERT_TENSOR, STREAM
from moe.dispatch.base import Assignments
from moe.routing.base import Routing

Compute = Callable[[jax.Array, Assignments, int], jax.Array]
"""(x [T, D], assignments to the experts held, bound on those that are not void) -> y [T, D]."""

Names = tuple[str, ...]
Sizes = Mapping[str, int]
"""Of every axis of the mesh."""

DUPLICATES = "tensor_expert_tensor"
"""Mesh axis that cuts positions of the residual stream and the hidden width of experts."""
DISPATCHED, COMBINED = "dispatched", "combined"
"""Checkpoint names of what collectives bring: the rows at their experts, and the sums back at the tokens."""


class Shared(NamedTuple):
    """What a device shares with others."""

    held: int
    """Experts it holds."""
    slices: Names
    """Axes of `expert_tensor` over which tokens differ: rows are gathered over them, sums scattered."""
    same: Names
    """Axes of `expert_tensor` over which every device has the same tokens: sums suffice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """Base of every exchange's config; its type selects the exchange."""

    @property
    def sends_duplicates(self) -> bool:
        """Whether the tensor-parallel copies of a token are all sent."""
        return False

    def at_capacity(self, capacity: float) -> "ExchangeConfig":
        """The same with a budget of `capacity`; itself if it has no budget."""
        return self

    def need(self, routing: Routing) -> jax.Array | None:
        """float32 [B] the budget that would hold all rows of the devices of a sequence; None: it has no budget."""
        return None

    def mesh_problems(self, sizes: Sizes) -> Iterator[tuple[str, str]]:
        """(field, what is wrong) of settings that cannot work on this mesh; asked where rows travel (`takes_place`)."""
        yield from ()

    def without_effect(self, sizes: Sizes) -> Iterator[tuple[str, str]]:
        """(field, why) of settings that change nothing on this mesh; asked where rows travel."""
        yield from ()

    def run(self, x_TD: jax.Array, a: Assignments, compute: Compute, shared: Shared) -> tuple[jax.Array, jax.Array]:
        """(y [T, D], int32 [R] 1 where a budget dropped the assignment), inside `shard_map`.

        Experts of `a` count through all devices; E marks a void one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingConfig(ExchangeConfig):
    """Tokens are gathered at every device that holds experts; exact."""

    def run(self, x_TD: jax.Array, a: Assignments, compute: Compute, shared: Shared) -> tuple[jax.Array, jax.Array]:
        over = EXPERT + shared.slices
        T = x_TD.shape[0]
        x_TD, token_R, expert_R, weight_R = (gather(part, over) for part in (x_TD, a.token_R, a.expert_R, a.weight_R))
        R = token_R.shape[0]
        sender_R = jnp.arange(R, dtype=jnp.int32) // a.token_R.shape[0]
        expert_R = expert_R - jax.lax.axis_index(EXPERT) * shared.held
        expert_R = jnp.where((expert_R >= 0) & (expert_R < shared.held), expert_R, shared.held)
        mine = Assignments(token_R + sender_R * T, expert_R, weight_R, a.num_selected)
        y_TD = jax.lax.psum(compute(x_TD, mine, R), shared.same)
        return scatter(y_TD, over), jnp.zeros_like(a.expert_R)


def takes_place(sizes: Sizes) -> bool:
    """Whether the mesh cuts experts or positions: where it does not, every device computes its own sequences whole."""
    return any(sizes[name] > 1 for name in EXPERT + EXPERT_TENSOR + STREAM)


def beyond_reach(budget: float | None, sizes: Sizes) -> Iterator[tuple[str, str]]:
    """Why a budget cuts nothing: all that n devices send, or that one sends to itself, is n times what is balanced."""
    ranks = math.prod(sizes[name] for name in EXPERT)
    if budget is not None and budget >= ranks:
        yield "budget", f"{ranks} times the balanced number is all there can be"


def live(names: Names) -> Names:
    """The axes among these that are larger than 1: collectives over the others move nothing."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if sizes[name] > 1)


def gather(x: jax.Array, names: Names, dimension: int = 0) -> jax.Array:
    """The parts of all devices along `names`, one after the other."""
    return jax.lax.all_gather(x, live(names), axis=dimension, tiled=True) if live(names) else x


def scatter(x: jax.Array, names: Names, dimension: int = 0) -> jax.Array:
    """Sums over the devices along `names`; each keeps its part."""
    return jax.lax.psum_scatter(x, live(names), scatter_dimension=dimension, tiled=True) if live(names) else x
