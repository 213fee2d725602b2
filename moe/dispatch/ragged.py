"""Rows travel straight to the devices that hold their experts in messages as long as they need to be.

A device sorts its rows by destination and sends every other one just its own; what it receives from n devices stands in
one buffer without gaps, of

    C = ceil(budget * R)          budget None: C = n R, the worst case, exact

rows. The budget is of what a device receives, looser than that of `AllToAllConfig` for every pair. What does not fit is
dropped and counted: the last rows of the last senders (in the order of the axis `expert`), so it depends on the mesh.

`jax.lax.ragged_all_to_all` exists on TPU and GPU. `transport` "emulated" pads the messages and sends a dense all-to-all
of the worst case instead, to the same result; "auto" does so where the platform is the CPU, and there alone. On GPUs
users report low bandwidth and hangs at hundreds of devices: measure before use. The native one was compiled for TPU and
run on neither.

Collectives, forward: all-gather(numbers of rows; expert), ragged-all-to-all(rows), the same of (expert, weight),
all-gather(both; expert_tensor), reduce-scatter(y; expert_tensor), ragged-all-to-all(y); backward: their transposes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe import axes
from moe.axes import EXPERT
from moe.dispatch.all_to_all import like, make_queue
from moe.dispatch.base import Assignments
from moe.dispatch.exchange import (
    DISPATCHED,
    Compute,
    ExchangeConfig,
    Shared,
    Sizes,
    beyond_reach,
    gather,
    live,
    scatter,
)
from moe.dispatch.rows import places, put, take
from moe.kernels.grouped import inverse, permute, platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedConfig(ExchangeConfig):
    """Every row is sent to the device of its expert, without padding."""

    budget: float | None = None
    """Rows a device may receive, as a multiple of the balanced number; None: whatever it takes."""
    transport: Literal["auto", "native", "emulated"] = "auto"
    """XLA's ragged all-to-all, a dense one that pads every message, or the native one wherever the platform has it."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.budget is not None and not self.budget > 0:
            yield "budget", "must be greater than 0, or None"

    def without_effect(self, sizes: Sizes) -> Iterator[tuple[str, str]]:
        yield from beyond_reach(self.budget, sizes)

    def run(self, x_TD: jax.Array, a: Assignments, compute: Compute, shared: Shared) -> tuple[jax.Array, jax.Array]:
        ranks = axes.size(jax.sharding.get_abstract_mesh(), EXPERT)
        R = a.token_R.shape[0]
        C = ranks * R if self.budget is None else min(ranks * R, max(1, math.ceil(self.budget * R - 1e-9)))
        native = self.transport == "native" or (self.transport == "auto" and platform() != "cpu")
        queue = make_queue(a.expert_R // shared.held, ranks)
        trip = _trip(jnp.diff(queue.first_n), C)
        over_R = queue.position_R >= jnp.append(trip.out.rows_n, R)[queue.to_R]

        row_R = jnp.where(queue.to_R < ranks, inverse(queue.order_R, R), R)
        here = places(a.token_R, queue.order_R, row_R, x_TD.shape[0], a.num_selected)
        expert_R = (a.expert_R % shared.held)[queue.order_R].astype(jnp.float32) + 1  # 0 says that a row is empty
        about_R2 = jnp.stack([permute(a.weight_R, queue.order_R, inverse(queue.order_R, R)), expert_R], axis=1)
        rows_CD = gather(_move(C, native, take(x_TD, here), trip), shared.slices)
        about_C2 = gather(_move(C, native, about_R2, trip), shared.slices)
        rows_CD, about_C2 = checkpoint_name((rows_CD, about_C2), DISPATCHED)
        number_C = about_C2[:, 1].astype(jnp.int32)
        expert_C = jnp.where(number_C > 0, number_C - 1, shared.held)
        N = rows_CD.shape[0]
        y_CD = compute(rows_CD, Assignments(jnp.arange(N, dtype=jnp.int32), expert_C, about_C2[:, 0], 1), N)
        y_CD = scatter(jax.lax.psum(y_CD, shared.same), shared.slices)
        return put(_move(R, native, y_CD, trip.reversed()), here, x_TD.shape[0]), over_R.astype(jnp.int32)


class Leg(NamedTuple):
    """What this device sends to each of n."""

    begin_n: jax.Array
    """int32 where the rows begin here."""
    rows_n: jax.Array
    """int32 how many they are."""
    there_n: jax.Array
    """int32 where they begin at their destination."""


class Trip(NamedTuple):
    out: Leg
    back: Leg
    """The same rows returning, as the device sends them that received them."""

    def reversed(self) -> "Trip":
        return Trip(self.back, self.out)


def _trip(rows_n: jax.Array, size: int) -> Trip:
    """Of this device's numbers of rows for each destination, where a destination has room for `size` in all."""
    rows_nn = gather(rows_n[None], EXPERT)  # by sender and destination
    begin_nn = jnp.cumsum(rows_nn, axis=1) - rows_nn
    there_nn = jnp.minimum(jnp.cumsum(rows_nn, axis=0) - rows_nn, size)
    sent_nn = jnp.minimum(rows_nn, size - there_nn)
    me = jax.lax.axis_index(EXPERT)
    parts = (begin_nn, sent_nn, there_nn)
    begin_n, sent_n, there_n = (part[me] for part in parts)
    home_n, received_n, stand_n = (part[:, me] for part in parts)
    return Trip(Leg(begin_n, sent_n, there_n), Leg(stand_n, received_n, home_n))


def _move(size: int, native: bool, rows_ND: jax.Array, trip: Trip) -> jax.Array:
    """[size, D] what arrives; 0 in rows where nothing does. Its gradient is the way back."""
    return _moved((rows_ND.shape[0], size, native), rows_ND, trip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moved(static: tuple[int, int, bool], rows_ND: jax.Array, trip: Trip) -> jax.Array:
    _, size, native = static
    (begin_n, rows_n, there_n), (stand_n, received_n, _) = trip
    arrived = like(rows_ND, jnp.zeros((size, rows_ND.shape[1]), rows_ND.dtype))
    if native:
        return jax.lax.ragged_all_to_all(
            rows_ND, arrived, begin_n, rows_n, there_n, received_n, axis_name=live(EXPERT) or EXPERT[0]
        )
    longest = min(size, rows_ND.shape[0])
    offset = jnp.arange(longest, dtype=jnp.int32)
    from_nl = jnp.where(offset < rows_n[:, None], begin_n[:, None] + offset, rows_ND.shape[0])
    padded_nlD = jnp.take(rows_ND, from_nl, axis=0, mode="fill", fill_value=0)
    if live(EXPERT):
        padded_nlD = jax.lax.all_to_all(padded_nlD, live(EXPERT), 0, 0, tiled=True)
    to_nl = jnp.where(offset < received_n[:, None], stand_n[:, None] + offset, size)
    return arrived.at[to_nl].set(padded_nlD, mode="drop")


def _moved_forward(static: tuple[int, int, bool], rows_ND: jax.Array, trip: Trip) -> tuple[jax.Array, Trip]:
    return _moved(static, rows_ND, trip), trip


def _moved_backward(static: tuple[int, int, bool], trip: Trip, grad_CD: jax.Array) -> tuple[jax.Array, None]:
    before, after, native = static
    return _moved((after, before, native), grad_CD, trip.reversed()), None


_moved.defvjp(_moved_forward, _moved_backward)
