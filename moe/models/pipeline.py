"""Pipeline stages: the repeats of a stack are cut over devices, and micro-batches pass through them one after another.

With P stages, M micro-batches and V rounds a stack of R repeats falls into V P chunks of R / (V P). Stage p holds the
chunks p, P + p, 2 P + p, ..., so a micro-batch runs through all stages V times. In every iteration each stage runs one
chunk on the micro-batch it holds and hands it on. Stage 0 begins items in the order

    V = 1 (GPipe): micro-batch 0, 1, ..., M - 1
    V > 1 (interleaved): P micro-batches through round 0, the same through round 1, ..., then the next P

and stage p works on item t - p in iteration t. All is done after V M + P - 1 iterations, of which a stage is idle in
P - 1: the bubble is (P - 1) / (V M + P - 1). An idle stage computes all the same, on tokens that some stage has or had,
and nobody reads what it makes of them: neither gradient nor statistics see it.

All stages are one array with a leading dimension that is cut over `stage`: they run side by side, and handing on is a
roll by one along it. The backward pass is the same loop in reverse. Micro-batch m holds the sequences m, M + m, 2 M +
m, ..., so that cutting the batch moves nothing between devices; statistics come back per sequence, in the order of the
batch, so they are pooled over micro-batches as over anything else, and no number depends on M, P or V.

Costs. Saved activations grow by the bubble. Weights that are cut over `fsdp` are gathered in every iteration. With V >
1 the stack is re-cut once a pass, from contiguous pieces (layer order, as in checkpoints) to chunks, and every
iteration's weight gradient is added into an array of all V chunks. What is not in a pipelined stack (embedding,
logits, other stacks) is computed by every stage on the whole batch. With remat "none" and bfloat16 every iteration
keeps cast weights.
Collectives per iteration: one collective-permute of a micro-batch over `stage`, beside those of the layers; per pass:
one all-reduce of the outputs over `stage`, and in the backward pass one of the inputs' gradients.
Source: Huang et al. 2019, GPipe (arXiv 1811.06965); Narayanan et al. 2021 (arXiv 2104.04473) for the interleaved
order; Xu et al. 2021, GSPMD (arXiv 2105.04663, section 3.3) for stages as a dimension. Differs from the papers: the
backward passes follow all forward ones (no 1F1B), so what is saved is that of all M micro-batches; recomputation is
`remat`'s.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe import axes
from moe.axes import STAGE, constrain
from moe.balance.statistics import Statistics
from moe.config import ConfigError, at_least
from moe.models import scan
from moe.models.layout import Stacks
from moe.models.remat import PICKED, picked_again
from moe.models.scan import Given
from moe.models.schedule import Schedule
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How a batch passes through `mesh.stages`."""

    microbatches: int = 4
    """M, pieces that a micro-batch of gradient accumulation is cut into again."""
    rounds: int = 1
    """V, chunks of layers per stage: 1 is GPipe; more interleave, with a smaller bubble and more communication."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, microbatches=1, rounds=1)

    def mesh_problems(self, trunk: Stacks, stages: int, batch: int, cuts: int) -> Iterator[tuple[str, str]]:
        """Problems with that many stages, for micro-batches of `batch` sequences that the mesh cuts `cuts` times."""
        if stages == 1:
            yield "pipeline", "is ignored with mesh.stages = 1; leave it None"
            return
        repeats = [stack.repeats for stack in trunk]
        if not any(divides(R, stages, self.rounds) for R in repeats):
            legal = [n for n in range(2, max(repeats) + 1) if any(divides(R, n, self.rounds) for R in repeats)]
            near = ", ".join(map(str, sorted(sorted(legal, key=lambda n: abs(n - stages))[:3]))) or "none"
            yield (
                "pipeline.rounds",
                f"times mesh.stages = {stages} must divide the repeats of a stack, which are"
                f" {', '.join(map(str, repeats))}; the nearest numbers of stages that do: {near}",
            )
        if batch % (self.microbatches * cuts):
            fits = [n for n in range(1, batch + 1) if batch % (n * cuts) == 0]
            near = ", ".join(map(str, sorted(sorted(fits, key=lambda n: abs(n - self.microbatches))[:3]))) or "none"
            yield (
                "pipeline.microbatches",
                f"times data * fsdp = {cuts} must divide the {batch} sequences of a micro-batch; the nearest that do:"
                f" {near}",
            )
        if self.rounds > 1 and self.microbatches % stages:
            yield "pipeline.microbatches", f"must be divisible by mesh.stages = {stages} with rounds > 1"

    def bubble(self, stages: int) -> float:
        """Share of the iterations in which a stage is idle."""
        return (stages - 1) / (self.rounds * self.microbatches + stages - 1)


def divides(repeats: int, stages: int, rounds: int) -> bool:
    """Whether a stack of so many repeats is pipelined."""
    return stages > 1 and repeats % (stages * rounds) == 0


def run(
    config: PipelineConfig | None, pattern: nnx.List, x_BSD: jax.Array, context: Context, given: Given, remat: str
) -> tuple[jax.Array, tuple[Statistics, ...]]:
    """`scan.run`, through the stages of the mesh in use if they divide the stack; the same numbers either way."""
    stages = axes.stages_in_use()
    if config is None or not divides(given.first_R.shape[0], stages, config.rounds):
        return scan.run(pattern, x_BSD, context, given, remat)
    if x_BSD.shape[0] % config.microbatches:
        raise ConfigError(
            f"model.pipeline.microbatches = {config.microbatches}: must divide the batch of {x_BSD.shape[0]} sequences"
        )
    with jax.named_scope("pipeline"):
        return _Loop(config, stages, pattern, context, given, remat)(x_BSD)


class _Loop:
    """One stack's pass through the pipeline."""

    def __init__(
        self, config: PipelineConfig, stages: int, pattern: nnx.List, context: Context, given: Given, remat: str
    ):
        self.schedule = Schedule(stages, config.microbatches, config.rounds)
        self.remat, self.context = remat, context
        self.graph, state = nnx.split(pattern)
        self.chunks = jax.tree.map(self._chunks, (state, given))

    def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, tuple[Statistics, ...]]:
        table = {name: jnp.asarray(value) for name, value in self.schedule.table().items()}
        of_batch = dataclasses.replace(self.context, step=None, key=None)  # type: ignore[arg-type]
        queue = jax.tree.map(self._queue, (x_BSD, of_batch))
        # Until micro-batches arrive, stages work on the first one: real tokens, so that nothing is NaN.
        held = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf[:, 0]), queue)
        out_PMbSD = jnp.zeros_like(queue[0])
        (_, _, out_PMbSD), sums = jax.lax.scan(self._iteration, (held, queue, out_PMbSD), table)
        last_P = jnp.arange(self.schedule.stages) == self.schedule.stages - 1
        out_MbSD = _where(last_P, out_PMbSD, jnp.zeros_like(out_PMbSD)).sum(axis=0)
        x_BSD = out_MbSD.swapaxes(0, 1).reshape(x_BSD.shape)
        return constrain(x_BSD, "batch", "stream", None), jax.tree.map(
            self._collect, sums, is_leaf=lambda part: isinstance(part, Statistics)
        )

    def _iteration(self, carry: Any, now: dict[str, jax.Array]) -> tuple[Any, tuple[Statistics, ...]]:
        held, queue, out_PMbSD = carry
        new, queue = _take(queue, now["takes"])
        takes_P = now["fresh"] & (jnp.arange(self.schedule.stages) == 0)

        handed = jax.tree.map(lambda leaf: _cut(jnp.roll(leaf, 1, axis=0), 1), held)
        x_PbSD, of_batch = jax.tree.map(lambda new, old: _where(takes_P, new, old), new, handed)
        x_PbSD, sums = axes.side_by_side(self._stage, self.chunks, now["round"], x_PbSD, of_batch)
        x_PbSD = constrain(x_PbSD, "layers", "batch", "stream", None)
        out_PMbSD = jax.lax.dynamic_update_index_in_dim(out_PMbSD, x_PbSD, now["gives"], 1)
        return ((x_PbSD, of_batch), queue, out_PMbSD), sums

    def _stage(
        self, chunks: Any, round_: jax.Array, x_bSD: jax.Array, of_batch: Context
    ) -> tuple[jax.Array, tuple[Statistics, ...]]:
        """One stage in one iteration: its chunk of this round on the micro-batch it holds."""
        context = dataclasses.replace(of_batch, step=self.context.step, key=self.context.key)

        def run(chunks: Any, x_bSD: jax.Array) -> tuple[jax.Array, tuple[Statistics, ...]]:
            state, given = jax.tree.map(lambda leaf: _pick(leaf, round_), chunks)
            return scan.repeat(self.graph, state, x_bSD, context, given, self.remat, self.schedule.stages)

        if self.schedule.rounds > 1:  # else every iteration would keep a copy of the weights it picked
            run = picked_again(run, self.remat, self.schedule.stages)
        return run(chunks, x_bSD)

    def _chunks(self, leaf_R: jax.Array) -> jax.Array:
        """[R, ...] in layer order -> [P, V, R / (V P), ...]."""
        P, V = self.schedule.stages, self.schedule.rounds
        return _cut(leaf_R.reshape(V, P, leaf_R.shape[0] // (V * P), *leaf_R.shape[1:]).swapaxes(0, 1), 0)

    def _queue(self, leaf_B: jax.Array) -> jax.Array:
        """[B, ...] -> [P, M, B / M, ...], the same for every stage, though only stage 0 takes from it.

        Were the stages to share one, the gradient of every iteration's input would be summed over them.
        """
        M = self.schedule.microbatches
        leaf_Mb = leaf_B.reshape(-1, M, *leaf_B.shape[1:]).swapaxes(0, 1)
        return _cut(jnp.broadcast_to(leaf_Mb, (self.schedule.stages, *leaf_Mb.shape)), 2)

    def _collect(self, sums: Statistics) -> Statistics:
        """What the stages counted in all iterations [T, P, R / (V P), b, ...] -> [R, B, ...]."""
        P, M, V = self.schedule.stages, self.schedule.microbatches, self.schedule.rounds

        def mine(leaf_T: jax.Array, stage: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(leaf_T, stage, self.schedule.num_items, 0)

        def in_order(leaf: jax.Array) -> jax.Array:  # -> [V, P, R / (V P), M, ...]
            leaf = jax.vmap(mine, (1, 0), spmd_axis_name=STAGE)(leaf, jnp.arange(P))
            members = P if V > 1 else 1
            leaf = leaf.reshape(P, -1, V, members, *leaf.shape[2:])  # [P, group, V, member, R / (V P), ...]
            leaf = jnp.moveaxis(leaf, (2, 0, 4), (0, 1, 2))
            return leaf.reshape(*leaf.shape[:3], M, *leaf.shape[5:])

        def per_sequence(leaf: jax.Array) -> jax.Array:
            leaf = in_order(leaf).swapaxes(3, 4)
            leaf = leaf.reshape(math.prod(leaf.shape[:3]), -1, *leaf.shape[5:])
            return constrain(leaf, None, "batch", *(None,) * (leaf.ndim - 2))

        below = sums.below_EH
        found = jax.tree.map(per_sequence, dataclasses.replace(sums, below_EH=None))
        if below is not None:
            below = in_order(below).sum(axis=3)
            below = below.reshape(-1, *below.shape[3:])
        return dataclasses.replace(found, below_EH=below)


def _pick(leaf_V: jax.Array, round_: jax.Array) -> jax.Array:
    """The chunk of a round; where there is one, no copy of it."""
    if leaf_V.shape[0] == 1:
        return leaf_V[0]
    return checkpoint_name(jax.lax.dynamic_index_in_dim(leaf_V, round_, 0, keepdims=False), PICKED)


def _take(queue: Any, slot: jax.Array) -> tuple[Any, Any]:
    """(what every leaf [P, M, ...] of the queue holds at `slot`, the queue for the next one to take from)."""

    def one(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return _take_once(leaf, slot)
        return jax.lax.dynamic_index_in_dim(leaf, slot, 1, keepdims=False), leaf

    leaves, tree = jax.tree.flatten(queue)
    taken, left = zip(*map(one, leaves), strict=True)
    return jax.tree.unflatten(tree, taken), jax.tree.unflatten(tree, left)


@jax.custom_vjp
def _take_once(leaf: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of every slot only what is taken first is used, so its gradient is written, not added: the backward pass of an
    ordinary index adds an array of the size of the whole queue in every iteration."""
    return jax.lax.dynamic_index_in_dim(leaf, slot, 1, keepdims=False), leaf


def _take_forward(leaf: jax.Array, slot: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return _take_once(leaf, slot), slot


def _take_backward(slot: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    taken, left = grads
    return jax.lax.dynamic_update_index_in_dim(left, taken, slot, 1), None


_take_once.defvjp(_take_forward, _take_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _where(mask_P: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Of a or b, stage by stage; the backward pass keeps the mask as it is, not as large as the arrays."""
    return _cut(jnp.where(mask_P.reshape(-1, *(1,) * (a.ndim - 1)), a, b), 0)


def _cut(leaf: jax.Array, batch: int) -> jax.Array:
    """`leaf` with its first dimension cut over the stages and dimension `batch`, if not 0, like the batch."""
    parts: list[Any] = [PartitionSpec.UNCONSTRAINED] * leaf.ndim
    parts[0] = STAGE
    if batch:
        parts[batch] = axes.BATCH
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*parts))
