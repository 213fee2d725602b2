"""What a compiled train step should and should not hold: collectives of the layout, and no whole copy of what is cut.

A collective over these mesh axes is expected (kind over axes, any part of them; axes of size 1 send nothing):

    all-gather, reduce-scatter   fsdp, context, tensor, expert_tensor, and the axes that cut weights of experts:
                                 weights and positions brought together, gradients cut again
    all-reduce                   any axes: gradients of what is replicated, partial sums, statistics
    collective-permute           the same as all-gather, which the TPU compiler turns into a ring of them around a
                                 matrix product; stages: pipelines
    all-to-all (ragged too)      expert: rows to their experts

What sends less than `SMALL` in a step is not looked at: shifts by one position, statistics.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from moe.axes import CONTEXT, EXPERT, EXPERT_DATA, EXPERT_TENSOR, FSDP, STAGE, TENSOR
from moe.plan.collectives import KINDS, Collective
from moe.plan.hlo import Array, Program

SMALL = 1 << 20
"""Bytes that one device sends in a step, below which a collective is not worth a question."""
_WEIGHTS = frozenset(FSDP + CONTEXT + TENSOR + EXPERT_TENSOR + EXPERT_DATA[1:])
_EXPECTED: dict[str, frozenset[str]] = {
    "all-gather": _WEIGHTS,
    "reduce-scatter": _WEIGHTS,
    "collective-permute": _WEIGHTS | {STAGE},
    "all-to-all": frozenset(EXPERT),
    "ragged-all-to-all": frozenset(EXPERT),
}


def unexpected(found: Iterable[Collective], mesh: Mapping[str, int], small: int = SMALL) -> list[Collective]:
    """The collectives that the layout does not explain, largest first; `mesh` is `Mesh.shape`."""
    odd = [
        one
        for one in found
        if one.kind != "all-reduce"
        and one.sent >= small
        and not {name for name in one.axes if mesh[name] > 1} <= _EXPECTED.get(one.kind, frozenset())
    ]
    return sorted(odd, key=lambda one: -one.sent)


def misplaced(executable: Any, state: Any, shardings: Any) -> list[str]:
    """Leaves of the train state that the compiled step takes or returns in another sharding than `shardings` says.

    `executable` is a compiled step (state, batch) -> (state, metrics). Each entry is `path: found, not wanted`.
    """
    (given, *_), _ = executable.input_shardings
    taken, _ = executable.output_shardings
    out = []
    for (path, leaf), wanted, *both in zip(
        jax.tree_util.tree_leaves_with_path(state), *map(jax.tree.leaves, (shardings, given, taken)), strict=True
    ):
        for where, actual in zip(("argument", "result"), both, strict=True):
            if not actual.is_equivalent_to(wanted, leaf.ndim):
                out.append(f"{where} {jax.tree_util.keystr(path)}: {actual}, not {wanted}")
    return out


def replicated(state: Any, shardings: Any, small: int = SMALL) -> list[str]:
    """Leaves of at least `small` bytes that every device holds whole, on a mesh that could cut them."""
    out = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    ):
        if sharding.mesh.size > 1 and _bytes(leaf) >= small and sharding.shard_shape(leaf.shape) == leaf.shape:
            out.append(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}")
    return out


def gathered(program: Program, state: Any, shardings: Any, small: int = SMALL) -> list[str]:
    """What collectives bring together in the shape of a whole leaf of the state that the table cuts over devices.

    Only leaves that stack layers are looked for: one layer's weights are gathered on purpose, all layers' never. What
    no collective makes may have that shape by chance, as probabilities [L, S, E] and a router [L, D, E] where S = D.
    """
    wholes: dict[tuple[int, ...], str] = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    ):
        cut = sharding.shard_shape(leaf.shape) != leaf.shape
        several = "stacks" in jax.tree_util.keystr(path) and leaf.shape[0] > 1
        if cut and several and _bytes(leaf) >= small:
            wholes.setdefault(_dims(leaf.shape), jax.tree_util.keystr(path))
    found: dict[str, None] = {}
    for one in program.executed():
        if not one.fused and any(kind in one.instruction.line for kind in KINDS):
            for array in one.instruction.arrays:
                if (name := wholes.get(_dims(array.dims))) is not None:
                    found[f"{array} as {name}: {one.instruction.origin}"] = None
    return list(found)


def largest(program: Program, number: int = 10, small: int = SMALL) -> list[tuple[Array, int, str]]:
    """The largest arrays that a step makes: (array, number of instructions that make one of this shape, one's origin).

    Arguments, tuples and what stays inside a fusion are left out. They need not exist at the same time.
    """
    found: dict[tuple[Array, str], int] = {}
    for one in program.executed():
        instruction = one.instruction
        if one.fused or instruction.op in _NO_ARRAYS or instruction.op.endswith("-done"):
            continue
        for array in instruction.arrays:
            if array.bytes >= small:
                key = (array, instruction.origin)
                found[key] = found.get(key, 0) + 1
    shapes: dict[Array, tuple[int, str]] = {}
    for (array, origin), times in found.items():
        count, known = shapes.get(array, (0, ""))
        shapes[array] = (count + times, known or origin)
    order = sorted(shapes, key=lambda array: -array.bytes)[:number]
    return [(array, *shapes[array]) for array in order]


_NO_ARRAYS = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant", "iota"}


def _dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions whatever their order; XLA transposes, and adds and removes dimensions of 1."""
    return tuple(sorted(n for n in dims if n > 1))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * (leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 4)
