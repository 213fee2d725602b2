"""Rows travel straight to the devices that hold their experts, and back: a dense all-to-all with fixed buffers.

Of its R assignments a device sends at most C to each of the n devices of the axis `expert`:

    C = ceil(budget * R / n)          budget None: C = R, the worst case, exact

in the order of sequences and positions, so that no later token pushes out an earlier one of its sequence. What does not
fit ("overflow") is

- `on_overflow` "drop": dropped, and counted per sequence. Which ones depends on the mesh: another mesh cuts the tokens
  otherwise. Dropped assignments have no gradient; the load keeps counting them.
- "rerun": sent in further rounds of the same size, in which no device takes part until one overflows. Exact. A round
  keeps nothing for its backward pass and is computed again there, so memory stays that of one round.

Every row carries its expert and, in float32, its combine weight, whose gradient comes back. Rows are gathered over
`expert_tensor` where they have arrived, and partial sums scattered, so a token is sent once. `drop_duplicates` False is
the baseline of the paper: the tensor-parallel copies of a token are all sent (over `tensor_expert_tensor`, the axis
that cuts positions and experts), nothing is gathered there, and partial sums are added up at every copy.

`hierarchical`: the exchange goes in two steps, inside a node and then across: n devices of the axis `expert` are
outer x inner, outer being the first of its mesh axes that is larger than 1. The same bytes cross nodes, in messages
that are `inner` times larger. `chunks`: assignments go in so many portions, which do not wait for each other, so that
XLA can compute one while another travels; each has a budget of its own. TPUs exchange asynchronously only with the
compiler option `xla_tpu_enable_async_all_to_all`: compiled with it for v5p:4x4x4 (jax 0.10.2, 2 chunks), the expert
products of one portion run between start and done of another's exchange; without it none does.

Collectives, forward: all-to-all(rows), all-to-all(expert and weight), all-gather(both; expert_tensor),
reduce-scatter(y; expert_tensor), all-to-all(y); backward: their transposes. The checkpoint name "dispatched" is on what
has arrived, `moe.dispatch.sharded` puts "combined" on the sums: a remat policy that saves both sends nothing again.
Source: Singh et al. 2023, DeepSpeed-TED (arXiv 2303.06318), duplicate token dropping and communication-aware
checkpointing; Hwang et al. 2023, Tutel (arXiv 2206.03382), the two steps. Differs from the papers: duplicates do not
arise, because the residual stream is cut over `tensor`; TED saves the output of every collective, here the last of each
chain is saved.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe import axes
from moe.axes import EXPERT
from moe.config import ConfigError, at_least
from moe.dispatch.base import Assignments
from moe.dispatch.exchange import (
    DISPATCHED,
    DUPLICATES,
    Compute,
    ExchangeConfig,
    Shared,
    Sizes,
    beyond_reach,
    gather,
    live,
    scatter,
)
from moe.dispatch.need import of_devices, portions
from moe.dispatch.rows import places, put, take
from moe.kernels.grouped import inverse, order_by, permute
from moe.routing.base import SAVED_NAME, Routing

Round = Callable[[jax.Array | int, jax.Array, jax.Array], jax.Array]
"""(index of the round, x [T, D], weight [R]) -> y [T, D] of what travels in this round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllToAllConfig(ExchangeConfig):
    """Every row is sent to the device of its expert, in buffers of fixed size."""

    budget: float | None = None
    """Rows a device may send to each other one, as a multiple of the balanced number; None: whatever it takes."""
    on_overflow: Literal["drop", "rerun"] = "drop"
    """What becomes of rows over the budget: dropped and counted, or sent in further rounds."""
    hierarchical: bool = False
    """Exchange inside a node first, then across nodes."""
    chunks: int = 1
    """Portions that are sent and computed independently of each other."""
    drop_duplicates: bool = True
    """Send every token once; False sends the tensor-parallel copies too, as a baseline."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.budget is not None and not self.budget > 0:
            yield "budget", "must be greater than 0, or None"
        if self.budget is None and self.on_overflow == "rerun":
            yield "on_overflow", "is ignored without a budget: nothing overflows"
        yield from at_least(self, chunks=1)

    def at_capacity(self, capacity: float) -> ExchangeConfig:
        return self if self.budget is None else dataclasses.replace(self, budget=capacity)

    def need(self, routing: Routing) -> jax.Array | None:
        return None if self.budget is None else of_devices(routing, self.chunks)

    def mesh_problems(self, sizes: Sizes) -> Iterator[tuple[str, str]]:
        names = [name for name in EXPERT if sizes[name] > 1]
        if self.hierarchical and len(names) < 2:
            yield (
                "hierarchical",
                f"experts lie on one mesh axis alone ({', '.join(names) or 'none'}); two steps need an outer and an"
                " inner one: let `expert` fold over two of data, fsdp, context and tensor",
            )

    def without_effect(self, sizes: Sizes) -> Iterator[tuple[str, str]]:
        yield from beyond_reach(self.budget, sizes)
        if self.sends_duplicates and sizes[DUPLICATES] == 1:
            yield "drop_duplicates", "no axis cuts both positions and the experts' hidden width: there are none"

    @property
    def sends_duplicates(self) -> bool:
        return not self.drop_duplicates

    def run(self, x_TD: jax.Array, a: Assignments, compute: Compute, shared: Shared) -> tuple[jax.Array, jax.Array]:
        K, done = a.num_selected, []
        for begin, end in portions(a.token_R.shape[0], K, self.chunks):
            part = Assignments(a.token_R[begin:end], a.expert_R[begin:end], a.weight_R[begin:end], K)
            if K is None:  # tokens are anywhere: every portion may add to all of them
                done.append(self._portion(x_TD, part, compute, shared))
            else:
                first, last = begin // K, end // K
                part = part._replace(token_R=part.token_R - first)
                done.append(self._portion(x_TD[first:last], part, compute, shared))
        y_TD = sum((y for y, _ in done[1:]), done[0][0]) if K is None else jnp.concatenate([y for y, _ in done])
        return y_TD, jnp.concatenate([over for _, over in done])

    def _portion(
        self, x_TD: jax.Array, a: Assignments, compute: Compute, shared: Shared
    ) -> tuple[jax.Array, jax.Array]:
        ranks = axes.size(jax.sharding.get_abstract_mesh(), EXPERT)
        R = a.token_R.shape[0]
        C = R if self.budget is None else min(R, max(1, math.ceil(self.budget * R / ranks - 1e-9)))
        queue = make_queue(a.expert_R // shared.held, ranks)
        over_R = ((queue.to_R < ranks) & (queue.position_R >= C)).astype(jnp.int32)

        def one_round(index: jax.Array | int, x_TD: jax.Array, weight_R: jax.Array) -> jax.Array:
            return self._round(x_TD, a._replace(weight_R=weight_R), queue.rows(index, C), compute, shared)

        y_TD = one_round(0, x_TD, a.weight_R)
        if self.on_overflow == "drop" or R <= C:
            return y_TD, over_R
        return y_TD + _further_rounds(one_round, y_TD, x_TD, a.weight_R, queue, C), jnp.zeros_like(over_R)

    def _round(
        self, x_TD: jax.Array, a: Assignments, at: tuple[jax.Array, jax.Array], compute: Compute, shared: Shared
    ) -> jax.Array:
        assignment_N, row_R = at
        here = places(a.token_R, assignment_N, row_R, x_TD.shape[0], a.num_selected)
        # Expert (exact in float32) and weight travel as one array; an empty row says that it has no expert.
        expert_N = jnp.take(a.expert_R % shared.held, assignment_N, mode="fill", fill_value=shared.held)
        about_2N = jnp.stack([permute(a.weight_R, assignment_N, row_R), expert_N.astype(jnp.float32)])
        rows_ND = gather(self._exchange(take(x_TD, here), 0), shared.slices)
        about_2N = gather(self._exchange(about_2N, 1), shared.slices, 1)
        rows_ND, (weight_N, expert_N) = checkpoint_name((rows_ND, about_2N), DISPATCHED)
        N = rows_ND.shape[0]
        token_N = jnp.arange(N, dtype=jnp.int32)
        y_ND = compute(rows_ND, Assignments(token_N, expert_N.astype(jnp.int32), weight_N, 1), N)
        y_ND = self._exchange(scatter(jax.lax.psum(y_ND, shared.same), shared.slices), 0)
        return put(y_ND, here, x_TD.shape[0])

    def _exchange(self, x: jax.Array, dimension: int) -> jax.Array:
        """Part i of `dimension` goes to device i, whose part comes here in its place. Its own inverse."""
        names = live(EXPERT)
        if not self.hierarchical:
            return jax.lax.all_to_all(x, names, dimension, dimension, tiled=True) if names else x
        for field, limit in self.mesh_problems(jax.sharding.get_abstract_mesh().shape):
            raise ConfigError(f"exchange.{field} = {getattr(self, field)}: {limit}")
        outer, inner = names[:1], names[1:]
        sizes = [axes.size(jax.sharding.get_abstract_mesh(), part) for part in (outer, inner)]
        split = x.reshape(*x.shape[:dimension], *sizes, -1, *x.shape[dimension + 1 :])
        split = jax.lax.all_to_all(split, inner, dimension + 1, dimension + 1, tiled=True)
        return jax.lax.all_to_all(split, outer, dimension, dimension, tiled=True).reshape(x.shape)


class Queue(NamedTuple):
    """Assignments lined up for their destinations."""

    order_R: jax.Array
    """int32 assignments sorted by destination; in order within one."""
    first_n: jax.Array
    """int32 [ranks + 1] where each destination's begin in `order_R`; the last are void."""
    to_R: jax.Array
    """int32 destination of every assignment; `ranks` if void."""
    position_R: jax.Array
    """int32 how many assignments stand before it for the same destination."""

    def rows(self, index: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        """(assignment of every row of a buffer [ranks, size], row of every assignment) of round `index`."""
        R, ranks = self.order_R.shape[0], self.first_n.shape[0] - 1
        begin_n = self.first_n[:-1] + index * size
        at_nC = begin_n[:, None] + jnp.arange(size, dtype=jnp.int32)
        used_nC = at_nC < self.first_n[1:, None]
        assignment_N = jnp.where(used_nC, self.order_R[jnp.minimum(at_nC, R - 1)], R).reshape(-1)
        slot_R = self.position_R - index * size
        here_R = (self.to_R < ranks) & (slot_R >= 0) & (slot_R < size)
        return assignment_N, jnp.where(here_R, self.to_R * size + slot_R, ranks * size)


def make_queue(to_R: jax.Array, ranks: int) -> Queue:
    """Sorts by destination. Kept by every remat policy: recomputation must not choose other rows."""
    R = to_R.shape[0]
    order_R = order_by(to_R, ranks)
    first_n = jnp.searchsorted(to_R[order_R], jnp.arange(ranks + 1), side="left").astype(jnp.int32)
    position_R = inverse(order_R, R) - jnp.append(first_n, R)[to_R]
    return checkpoint_name(Queue(order_R, first_n, to_R, position_R), SAVED_NAME)


def _further_rounds(
    one_round: Round, first_TD: jax.Array, x_TD: jax.Array, weight_R: jax.Array, queue: Queue, size: int
) -> jax.Array:
    """The sum of the rounds after the first, each only if somewhere in the mesh a destination has rows left for it."""
    zeros_TD = like(first_TD, jnp.zeros_like(first_TD))
    last_R = jnp.where(queue.to_R < queue.first_n.shape[0] - 1, queue.position_R, -1)
    most = jax.lax.pmax(last_R.max(), varying(last_R))  # one answer for all who take part in collectives
    compute_again = jax.checkpoint(one_round)

    def one_more(y_TD: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        done = lambda: y_TD  # noqa: E731
        return jax.lax.cond(index * size <= most, lambda: y_TD + compute_again(index, x_TD, weight_R), done), None

    rounds = jnp.arange(1, -(-weight_R.shape[0] // size), dtype=jnp.int32)
    return jax.lax.cond(size <= most, lambda: jax.lax.scan(one_more, zeros_TD, rounds)[0], lambda: zeros_TD)


def like(model: jax.Array, x: jax.Array) -> jax.Array:
    """x, typed as varying over the mesh axes that `model` varies over."""
    missing = tuple(name for name in varying(model) if name not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying(x: jax.Array) -> tuple[str, ...]:
    """Mesh axes over which the value differs between devices, by its type."""
    found = jax.typeof(x).manual_axis_type.varying
    return tuple(name for name in axes.MESH_AXES if name in found)
