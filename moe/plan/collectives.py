"""What a compiled program sends between devices: kind, bytes, times a step, and over which axes of the mesh.

Bytes are what one device sends, by the algorithm of a ring over a group of n devices and a payload of s bytes:

    all-gather (n-1)/n of the result     reduce-scatter (n-1)/n of the operand     all-reduce 2 (n-1)/n s
    all-to-all (n-1)/n s                 collective-permute s                      ragged-all-to-all at most s

A start and its done count once, and so do the pieces of a collective that the TPU compiler spreads over other fusions.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe.axes import CONTEXT, DATA, EXPERT, EXPERT_DATA, EXPERT_TENSOR, FSDP, STAGE, TENSOR
from moe.plan.hlo import Array, Instruction, Program

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The axes of both grids as a person names them.
_GRIDS: dict[str, tuple[str, ...]] = {
    "stages": (STAGE,),
    "data": DATA,
    "fsdp": FSDP,
    "context": CONTEXT,
    "tensor": TENSOR,
    "expert": EXPERT,
    "expert_tensor": EXPERT_TENSOR,
    "expert_data": EXPERT_DATA,
}
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ATTRIBUTE = re.compile(r"(?:replica_groups|source_target_pairs)=")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
    """One array that a collective sends; a combined collective has one entry for each of its arrays."""

    kind: str
    array: Array
    """The result on one device (of an all-to-all over a tuple, one part of it)."""
    axes: frozenset[str]
    """Mesh axes along which a group's devices differ; empty without a mesh, or if the group is one device."""
    group: int
    """n, devices in a group; of a collective-permute 2."""
    bytes: int
    """Bytes that one device sends each time."""
    times: int
    """How often a step executes it."""
    origin: str
    """The scope in the Python code that it comes from."""

    @property
    def sent(self) -> int:
        """Bytes a device sends for it in one step."""
        return self.bytes * self.times


def collectives(program: Program, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """Every collective a step executes; `mesh` is `Mesh.shape`: sizes of its axes by name, slowest first."""
    found, chains = [], set()
    for one, computation, times, _ in program.executed():
        kind = one.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        if (chain := _CHAIN.search(one.line)) is not None:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        groups = _groups(one, mesh)
        n = 2 if kind == "collective-permute" else groups.shape[1]
        axes = frozenset() if mesh is None else _axes(groups, mesh)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a fusion of the TPU compiler: reduce, keep one's own slice
            found += [
                Collective(kind, array, axes, n, array.bytes * (n - 1) // n, times, one.origin) for array in one.arrays
            ]
            continue
        found += [
            Collective(kind, array, axes, n, _sent(kind, array.bytes, n), times, one.origin) for array in _results(one)
        ]
    return found


def axes_name(axes: Iterable[str], mesh: Mapping[str, int]) -> str:
    """Mesh axes as axes of the dense or the expert grid: `fsdp`, `data+fsdp`; `fsdp=expert` if the two coincide."""
    wanted = {name for name in axes if mesh[name] > 1}
    if not wanted:
        return "none"
    real = {grid: {name for name in names if mesh[name] > 1} for grid, names in _GRIDS.items()}
    if same := [grid for grid, names in real.items() if names == wanted]:
        return "=".join(same)
    dense = [grid for grid in ("stages", "data", "fsdp", "context", "tensor") if real[grid] and real[grid] <= wanted]
    rest = wanted - set().union(*(real[grid] for grid in dense))
    return "+".join([*dense, *(name for name in mesh if name in rest)])


def _results(one: Instruction) -> list[Array]:
    """The arrays a collective gives; the start of most asynchronous ones lists its operands before, contexts behind."""
    found = one.arrays
    if one.op in ("all-gather-start", "reduce-scatter-start", "all-to-all-start"):
        return found[len(found) // 2 :]
    if one.op == "collective-permute-start":
        return found[1:2]
    return found


def _sent(kind: str, size: int, n: int) -> int:
    """Bytes one device sends for a result of `size` bytes."""
    if kind == "all-reduce":
        return 2 * size * (n - 1) // n
    if kind == "reduce-scatter":
        return size * (n - 1)
    if kind in ("collective-permute", "collective-broadcast", "ragged-all-to-all"):
        return size
    return size * (n - 1) // n


def _groups(one: Instruction, mesh: Mapping[str, int] | None) -> np.ndarray:
    """int [groups, n]: places in the mesh's flat order, which is how a program numbers its devices."""
    found = _ATTRIBUTE.search(one.line)
    text = one.line[found.end() :] if found else ""
    if (iota := _IOTA.match(text)) is not None:
        shape, source = _ints(iota[1]), _ints(iota[2])
        ids = np.arange(math.prod(source)).reshape(source)
        return (ids.transpose(_ints(iota[3])) if iota[3] else ids).reshape(shape)
    if (named := _NAMED.match(text)) is not None:
        return _named_groups(named[1], named[2], named[3])
    if text.startswith("{{"):
        rows = [_ints(row) for row in re.findall(r"\{([\d,]+)\}", text[1 : text.index("}}") + 1])]
        return np.array(rows)
    total = math.prod(mesh.values()) if mesh is not None else 1
    if text.startswith("{}"):
        return np.arange(total).reshape(1, -1)
    raise ValueError(f"groups of devices in a form that is not known: {one.line.strip()[:300]}")


def _named_groups(mesh: str, order: str | None, axes: str) -> np.ndarray:
    """Groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}`.

    Along whole axes of a mesh of the compiler's own, or along 2 of an axis behind 2 of it; the ids are a transposed
    count, or a list.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    cut: dict[str, tuple[int, int, int]] = {name: (size, 1, 1) for name, size in sizes.items()}
    grouped: list[tuple[str, int]] = []
    for name, pre, part in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", axes):
        if part:
            before, size = int(pre), int(part)
            cut[name] = (before, size, sizes[name] // before // size)
            grouped.append((name, 1))
        else:
            grouped.append((name, 0))
    shape = [part for name in sizes for part in cut[name]]
    places = {name: 3 * index for index, name in enumerate(sizes)}
    inner = [places[name] + offset for name, offset in grouped]
    outer = [index for index in range(len(shape)) if index not in inner]
    n = math.prod(shape[index] for index in inner)
    ids = np.arange(math.prod(shape))
    if order is not None and (counted := _IDS.fullmatch(order)) is not None:
        ids = ids.reshape(_ints(counted[1]))
        ids = ids.transpose(_ints(counted[2])) if counted[2] else ids
    elif order is not None:
        ids = np.array(_ints(order))
    return ids.reshape(shape).transpose([*outer, *inner]).reshape(-1, n)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> frozenset[str]:
    """Mesh axes along which the members of some group differ."""
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    varies = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return frozenset(name for name, one in zip(mesh, varies, strict=True) if one)


def _ints(text: str) -> Sequence[int]:
    return tuple(int(n) for n in text.split(",") if n)
