"""What one train step is asked to do, on how many devices, and how its tensors are cut there: all in plain integers."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from flax import nnx

from moe import param
from moe.axes import TABLE
from moe.folding import MeshConfig
from moe.layers.base import SublayerConfig
from moe.models import DecoderConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""Bytes of an element of `compute_dtype`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One train step of a decoder on a number of devices."""

    model: DecoderConfig
    mesh: MeshConfig
    devices: int
    """Devices of JAX; a chip may be two."""
    batch_size: int
    """Sequences in the global batch."""
    accumulation: int
    """A."""
    seq_len: int
    """S."""
    host_moments: bool = False
    """Whether the optimizer's moments lie in the host's memory."""

    @property
    def microbatch(self) -> int:
        """Sequences in one micro-batch over all devices."""
        return self.batch_size // self.accumulation

    @property
    def microbatch_tokens(self) -> int:
        return self.microbatch * self.seq_len


class Grid:
    """Into how many pieces the mesh cuts a dimension; ConfigError from the constructor if the mesh does not fold."""

    def __init__(self, mesh: MeshConfig, devices: int):
        self.devices = devices
        self.sizes = mesh.sizes(devices)
        factors = mesh.factors(devices)
        named = {axis: (names,) if isinstance(names, str) else names or () for axis, names in TABLE.items()}
        self._pieces = {axis: math.prod(factors[name] for name in names) for axis, names in named.items()}
        self.memo: dict[tuple[Weights, bool], int] = {}
        """What is known of weights on this grid: a search asks for the same again and again."""

    def pieces(self, axis: str | None) -> int:
        """Of a dimension with this logical axis."""
        return self._pieces[axis] if axis is not None else 1

    def cut(self, *axes: str | None) -> int:
        """Of a tensor whose dimensions carry these logical axes."""
        return math.prod(self.pieces(axis) for axis in axes)


@functools.lru_cache(maxsize=4096)
def grid_of(mesh: MeshConfig, devices: int) -> Grid:
    """One grid for all who ask for the same."""
    return Grid(mesh, devices)


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A parameter of one sublayer of the model, or of what is no sublayer."""

    stack: int | None
    """Which stack of the layout; None: embedding, head, final norm and what else runs once."""
    place: int | None
    """Which sublayer of the stack's pattern."""
    name: str
    """The parameter's own, without the path to its module."""
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    """Of one repeat."""
    repeats: int

    @property
    def size(self) -> int:
        """Elements of one repeat."""
        return math.prod(self.shape)

    @property
    def routed(self) -> bool:
        """Whether it belongs to experts that are spread over devices."""
        return "experts" in self.axes

    @property
    def cut_by_tensor(self) -> bool:
        return bool({"heads", "mlp"}.intersection(self.axes))

    def held(self, grid: Grid) -> int:
        """Elements, of all repeats, that one device holds; the repeats of a pipelined stack lie on its stages."""
        if (found := grid.memo.get((self, True))) is None:
            local = math.prod(-(-n // grid.pieces(axis)) for n, axis in zip(self.shape, self.axes, strict=True))
            stages = grid.sizes["stages"] if self.repeats > 1 else 1
            found = grid.memo[self, True] = local * -(-self.repeats // stages)
        return found

    def gathered(self, grid: Grid) -> int:
        """Elements of one repeat on one device while it is used: all but what experts, heads and widths are cut by."""
        if (found := grid.memo.get((self, False))) is None:
            kept = (1 if axis in ("embed", "expert_embed") else grid.pieces(axis) for axis in self.axes)
            found = math.prod(-(-n // pieces) for n, pieces in zip(self.shape, kept, strict=True))
            grid.memo[self, False] = found
        return found


@functools.lru_cache(maxsize=64)
def weights(model: DecoderConfig) -> tuple[Weights, ...]:
    """All parameters of the model, from shapes alone; ConfigError if the config is bad."""
    return _once(dataclasses.replace(model, remat="none", pipeline=None))


@functools.lru_cache(maxsize=8)
def _once(model: DecoderConfig) -> tuple[Weights, ...]:
    """`weights`, which no remat policy and no pipeline changes: making the abstract model is what takes time."""
    return tuple(_weights(model))


def _weights(model: DecoderConfig) -> Iterator[Weights]:
    layout = model.layout
    for path, variable in nnx.to_flat_state(nnx.state(model.abstract(), nnx.Param)):
        axes, shape = variable.get_metadata()[param.AXES_KEY], variable.get_value().shape
        if path[0] == "stacks":
            stack, place = (int(str(name)) for name in path[1:3])
            yield Weights(stack, place, str(path[-1]), axes, tuple(shape[-len(axes) :]), layout[stack].repeats)
        else:
            yield Weights(None, None, str(path[-1]), axes, tuple(shape), 1)


def of_sublayer(found: Sequence[Weights], stack: int, place: int) -> list[Weights]:
    return [one for one in found if (one.stack, one.place) == (stack, place)]


def places(model: DecoderConfig) -> Iterator[tuple[int, int, SublayerConfig, int]]:
    """(stack, place in its pattern, config, repeats) of every sublayer."""
    for number, stack in enumerate(model.layout):
        for place, config in enumerate(stack.layers):
            yield number, place, config, stack.repeats
