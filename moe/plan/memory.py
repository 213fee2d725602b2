"""Bytes on one device at the worst moment of a train step, term by term, from what the program keeps.

Always there: parameters and two moments (float32, exact shard shapes from the table of `moe.axes`) and the batch. What
comes on top differs over the step; the worst of three moments counts:

    layers   the backward pass of the stack with the largest layer: gradients of all layers, what the forward pass
             saved, one repeat computed again with all it keeps for its gradient, and its gathered weights
    loss     what the forward pass saved; logits and their gradient, the gathered head and its gradient
    update   gradients

With accumulation a second set of gradients lives through the first two. `copies` are the parameters in the compute
dtype, still cut: XLA converts a whole stack once, before the loop over its repeats.

Every coefficient is a tensor that the compiled program holds at that moment (read off buffer assignments of libtpu
0.0.42, see the comments); nothing is fitted. What the prediction leaves out: padding of small tiles, and what the
compiler recomputes by itself when memory is short.
Differs from Galvatron (arXiv 2211.13878): terms are derived instead of profiled.
"""

from typing import NamedTuple

from moe.plan.layer_memory import Layers
from moe.plan.traits import Trait
from moe.plan.workload import ITEMSIZE, Grid, Workload, grid_of, weights


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: float
    moments: float
    batch: float
    gradients: float
    accumulated: float
    """The sum over micro-batches, beside the gradients of one."""
    copies: float
    """Parameters in the compute dtype, cut as they are stored."""
    inputs: float
    """Of every repeat, [B, S, D], saved for the backward pass."""
    routing: float
    """Router outputs, which every remat policy keeps."""
    kept: float
    """What else the remat policy keeps."""
    layer: float
    """Activations of the repeat whose gradient is being computed."""
    gathered: float
    """Its weights, gathered, and their gradient before it is scattered."""
    embedding: float
    """The gathered token embedding, where the compiler keeps it over micro-batches."""
    head: float
    """Gradient of the gathered head in float32: chunked logits add it up, and it is reduced after the layers."""
    pipeline: float
    """What a pipelined stack keeps on top: see `_pipelined`."""
    loss: float
    """Logits, hidden vectors, the gathered head and their gradients."""

    @property
    def arguments(self) -> float:
        """What exists between steps."""
        return self.parameters + self.moments + self.batch

    @property
    def moments_of_step(self) -> dict[str, float]:
        """Temporaries at each of the moments that can be the worst."""
        saved = self.copies + self.accumulated + self.inputs + self.routing + self.kept
        return {
            "layers": saved + self.embedding + self.head + self.gradients + self.pipeline + self.layer + self.gathered,
            "loss": saved + self.embedding + self.head + self.loss,
            "update": self.gradients,
        }

    @property
    def temporaries(self) -> float:
        return max(self.moments_of_step.values())

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries

    def terms(self) -> dict[str, float]:
        """The terms that are there at the worst moment."""
        found = self._asdict()
        moment = max(self.moments_of_step, key=self.moments_of_step.__getitem__)
        absent = {
            "layers": ("loss",),
            "loss": ("gradients", "layer", "gathered", "pipeline"),
            "update": (
                "accumulated",
                "copies",
                "inputs",
                "routing",
                "kept",
                "layer",
                "gathered",
                "loss",
                "embedding",
                "head",
                "pipeline",
            ),
        }
        return {name: size for name, size in found.items() if name not in absent[moment]}


def state_bytes(work: Workload) -> float:
    """Parameters, moments and gradients: what no remat policy and no accumulation can lessen."""
    return (8 if work.host_moments else 16) * _held(work, grid_of(work.mesh, work.devices))


def least_bytes(work: Workload) -> float:
    """Less than `memory` says in total of this mesh, whatever is recomputed, accumulated and piped.

    State, and the copies in the compute dtype: they and the gradients are there at once, in the layers.
    """
    grid, size = grid_of(work.mesh, work.devices), ITEMSIZE[work.model.compute_dtype]
    stacked = sum(one.held(grid) for one in weights(work.model) if one.stack is not None)
    return state_bytes(work) + (size * stacked if size < 4 else 0)


def memory(work: Workload) -> Memory:
    """What one device holds; the mesh must fold."""
    return _Device(work).memory()


def _held(work: Workload, grid: Grid) -> int:
    return sum(one.held(grid) for one in weights(work.model))


class _Device(Layers):
    def memory(self) -> Memory:
        work, held = self.work, _held(self.work, self.grid)
        stacked = sum(one.held(self.grid) for trait in self.found for one in trait.weights)
        patterns = self._patterns()
        # A stack of one repeat is no loop: its weights are gathered while those of the loop beside it are, but the two
        # work one after the other.
        once = [pattern for pattern in patterns if pattern[0].repeats == 1]
        loops = [pattern for pattern in patterns if pattern[0].repeats > 1] or once[:1]
        worst = max(loops, key=lambda pattern: self.layer(pattern) + self.gathered(pattern))
        held_at_once = [worst, *(pattern for pattern in once if pattern is not worst)]
        heads = 1 + (work.model.ahead.depth if work.model.ahead is not None else 0)
        return Memory(
            parameters=4 * held,
            moments=0 if work.host_moments else 8 * held,
            batch=16 * work.batch_size * (work.seq_len + 1) / self.grid.cut("batch"),
            gradients=4 * held,
            accumulated=4 * held if work.accumulation > 1 else 0,
            copies=self.itemsize * stacked if self.itemsize < 4 else 0,
            inputs=self._inputs(patterns),
            routing=sum(self._repeats(one) * self._routing(one) for one in self.found),
            kept=sum(self._repeats(one) * self.kept(one) for one in self.found),
            layer=max(map(self.layer, held_at_once)),
            gathered=sum(map(self.gathered, held_at_once)),
            embedding=self._embedding(),
            head=4 * self._table() * heads,
            pipeline=self._pipelined(patterns),
            loss=self._loss(),
        )

    def _patterns(self) -> list[tuple[Trait, ...]]:
        """The sublayers of every stack's pattern."""
        found, start = [], 0
        for stack in self.model.layout:
            found.append(self.found[start : start + len(stack.layers)])
            start += len(stack.layers)
        return found

    def _repeats(self, one: Trait) -> float:
        """Of a sublayer, how often one device keeps what it keeps of a micro-batch's tokens."""
        stages = self.sizes["stages"]
        if stages == 1 or one.repeats % stages:
            return one.repeats * self.microbatches
        return one.repeats / stages * self.excess * self.microbatches

    def _inputs(self, patterns: list[tuple[Trait, ...]]) -> float:
        if self.model.remat == "offload":
            return 0.0
        return sum(self._repeats(pattern[0]) for pattern in patterns) * self.tokens * self.model.width * self.itemsize

    def _routing(self, one: Trait) -> float:
        """Logits, chosen experts and where their rows stand, of one repeat."""
        return self.tokens * 4 * (one.num_experts + one.index_arrays * one.rows_per_token)

    def _pipelined(self, patterns: list[tuple[Trait, ...]]) -> float:
        """Per iteration the stage's weights in the compute dtype; of the iteration at hand once more those, its inputs
        and router outputs, and a set of gradients; the queue of micro-batches and its gradient."""
        if self.sizes["stages"] == 1:
            return 0.0
        held = sum(one.held(self.grid) for trait in self.found for one in trait.weights)
        copies = self.itemsize * held * (self.iterations + 1) if self.itemsize < 4 else 0
        now = self._inputs(patterns) + sum(self._repeats(one) * self._routing(one) for one in self.found)
        queue = 2 * self.batch_tokens * self.model.width * self.itemsize
        return copies + 4 * held + now / self.iterations + queue

    def _embedding(self) -> float:
        """The table in the compute dtype, whole in D: made once for all micro-batches and kept."""
        if self.work.accumulation == 1:
            return 0.0
        return self.itemsize * self._table()

    def _table(self) -> float:
        return self.model.width * self.model.vocab_size / self.grid.pieces("vocab")

    def _loss(self) -> float:
        """Logits and their gradient of all tokens or a chunk of them, hidden vectors and their gradient, the head."""
        tokens = self.batch_tokens * self.sizes["tensor"]
        vocab = self.model.vocab_size / self.grid.pieces("vocab")
        chunk = self.model.logit_chunk
        count = min(chunk, tokens) if chunk else tokens
        logits = count * vocab * (4 + 4 + self.itemsize if chunk else 4 + self.itemsize)
        hidden = 2 * self.batch_tokens * self.model.width * self.itemsize
        heads = 1 if chunk else 2  # gathered for the logits, and once more for their gradient
        return logits + hidden + self.itemsize * heads * self._table()
