"""Capacity dispatch: a fixed buffer per expert and group of tokens; what does not fit is dropped, and counted.

    C = ceil(capacity_factor * R / E)         R assignments and E experts of a group; the group is one sequence

The group is a sequence because the config, never the mesh, must say who competes with whom: the same tokens are dropped
on any number of devices and at any accumulation. It is not invariant to padding or to another group, and says so: a
longer sequence has a larger buffer. Dropped assignments add nothing to their token; the load keeps counting them, so a
drop cannot hide an overload. Void assignments take no place.

Who is dropped: `order` keeps the first in the sequence, `score` keeps the highest combine weights, `priority` keeps
the highest of what the router says (random token selection: `SwitchConfig(random_token_selection=True)`). Ties: the
first stays. `score` and `priority` can let a later token evict an earlier one: not causal once something is dropped.
Gradient: none to dropped assignments. Collectives: none.
Source: Fedus et al. 2021 (arXiv 2101.03961, eq. 3); GShard (arXiv 2006.16668, algorithm 1) for the order rule.
Differs from the paper: groups are sequences.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.dispatch.base import Assignments, DispatchConfig, Dispatcher, ExpertWeights, expert_mlp, grouped_mlp
from moe.dispatch.need import of_experts
from moe.routing.base import SAVED_NAME, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityConfig(DispatchConfig):
    """A fixed buffer per expert; drops are counted."""

    capacity_factor: float = 1.25
    """Buffer size as a multiple of the balanced load."""
    keep: Literal["order", "score", "priority"] = "order"
    """Which assignments stay when a buffer overflows: the first ones, those with the highest weight, or those the
    router gives the highest priority."""

    @property
    def uses_priority(self) -> bool:
        return self.keep == "priority"

    def at_capacity(self, capacity: float) -> DispatchConfig:
        return dataclasses.replace(self, capacity_factor=capacity)

    def need(self, routing: Routing) -> jax.Array:
        return of_experts(routing)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.capacity_factor > 0:
            yield "capacity_factor", "must be greater than 0"

    def build(self) -> Dispatcher:
        return Capacity(self)


@dataclasses.dataclass(frozen=True)
class Capacity(Dispatcher):
    """Whole sequences on one device: a buffer for every expert. Rows that travel: dropped ones stay, then grouped."""

    config: CapacityConfig

    def size(self, routing: Routing) -> int:
        """C."""
        R = routing.expert_BR.shape[1]
        exact = self.config.capacity_factor * R / routing.num_experts
        return min(R, max(1, math.ceil(exact - 1e-9)))  # 1.1 * 10 is 11.000000000000002

    def __call__(self, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
        assignment_BEC, dropped_B = self._kept(routing)
        return _through_buffers(x_BSD, routing, weights, assignment_BEC), dropped_B

    def select(self, routing: Routing) -> tuple[Routing, jax.Array]:
        B, R = routing.expert_BR.shape
        assignment_BEC, dropped_B = self._kept(routing)
        nobody = jnp.zeros((R,), bool)
        kept_BR = jax.vmap(lambda a: nobody.at[a].set(True, mode="drop"))(assignment_BEC.reshape(B, -1))
        expert_BR = jnp.where(kept_BR, routing.expert_BR, routing.num_experts)
        weight_BR = jnp.where(kept_BR, routing.weight_BR, 0)
        return dataclasses.replace(routing, expert_BR=expert_BR, weight_BR=weight_BR), dropped_B

    def compute(self, x_TD: jax.Array, a: Assignments, weights: ExpertWeights, bound: int) -> jax.Array:
        return grouped_mlp(x_TD, a, weights, bound)

    def _kept(self, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """(int32 [B, E, C] assignments in every buffer, R where empty; int32 [B] how many did not fit)."""
        priority_BR = _priority(routing, self.config.keep)
        E, size = routing.num_experts, self.size(routing)
        slots = jax.vmap(lambda expert_R, priority_R: _fill(expert_R, priority_R, E, size))
        # Recomputed weights may differ in the last bit: the backward pass must not keep other assignments.
        return checkpoint_name(slots(routing.expert_BR, priority_BR), SAVED_NAME)


def _through_buffers(
    x_BSD: jax.Array, routing: Routing, weights: ExpertWeights, assignment_BEC: jax.Array
) -> jax.Array:
    B, S, D = x_BSD.shape
    E, size = assignment_BEC.shape[1:]

    def gather(values: jax.Array) -> jax.Array:  # [B, R, ...] -> [B, E, C, ...], zeros in empty slots
        return jax.vmap(lambda v, a: jnp.take(v, a, axis=0, mode="fill", fill_value=0))(values, assignment_BEC)

    token_BEC = jnp.where(assignment_BEC < routing.token_BR.shape[1], gather(routing.token_BR), S)
    x_BECD = jax.vmap(lambda x, t: jnp.take(x, t, axis=0, mode="fill", fill_value=0))(x_BSD, token_BEC)
    x_ETD = x_BECD.transpose(1, 0, 2, 3).reshape(E, B * size, D)
    y_ETD = expert_mlp(x_ETD, gather(routing.weight_BR).transpose(1, 0, 2).reshape(E, B * size), weights)
    y_BTD = y_ETD.reshape(E, B, size, D).transpose(1, 0, 2, 3).reshape(B, E * size, D).astype(jnp.float32)
    zeros = jnp.zeros((S, D), jnp.float32)
    y_BSD = jax.vmap(lambda t, y: zeros.at[t].add(y, mode="drop"))(token_BEC.reshape(B, -1), y_BTD)
    return y_BSD.astype(x_BSD.dtype)


def _priority(routing: Routing, keep: str) -> jax.Array:
    if keep == "priority":
        if routing.priority_BR is None:
            raise ValueError(
                "CapacityConfig.keep = 'priority': this router gives its assignments no priority; use 'order' or "
                "'score', or a router that does, as SwitchConfig(random_token_selection=True)"
            )
        return routing.priority_BR
    return jax.lax.stop_gradient(routing.weight_BR) if keep == "score" else jnp.zeros_like(routing.weight_BR)


def _fill(expert_R: jax.Array, priority_R: jax.Array, num_experts: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Assignments in every expert's buffer [E, C] (R where empty), and how many did not fit."""
    R = expert_R.shape[0]
    here_R = expert_R < num_experts
    # Sorted by expert, then by falling priority, then by order; the rank inside the expert is the slot.
    by_priority_R = jnp.argsort(-priority_R, stable=True)
    order_R = by_priority_R[jnp.argsort(expert_R[by_priority_R], stable=True)]
    sorted_R = expert_R[order_R]
    first_E = jnp.searchsorted(sorted_R, jnp.arange(num_experts + 1), side="left")
    rank_R = jnp.arange(R) - first_E[sorted_R]
    fits_R = (sorted_R < num_experts) & (rank_R < size)
    slot_R = jnp.where(fits_R, sorted_R * size + rank_R, num_experts * size)
    assignment_EC = jnp.full((num_experts * size,), R, jnp.int32).at[slot_R].set(order_R.astype(jnp.int32), mode="drop")
    return assignment_EC.reshape(num_experts, size), (here_R.sum() - fits_R.sum()).astype(jnp.int32)
