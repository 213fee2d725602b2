"""Sizes of the two grids of devices, and whether they fold: see `moe.axes` for what they are.

Devices are numbered in the order of the dense grid, `tensor` fastest; the expert grid numbers the same devices with
`expert_tensor` fastest. Two such countings are products of common factors if, walking from the fastest axis outwards,
every border of one grid divides or is divided by every border of the other:

    tensor, tensor*context, tensor*context*fsdp, ...    and    expert_tensor, expert_tensor*expert, ...

`expert = 4` folds over `fsdp = 2, data = 4`, and over `fsdp = 8`; `expert = 4` over `tensor = 3` does not.
"""

import dataclasses
import math
from collections.abc import Iterator

from moe.config import ConfigError, at_least

DENSE = ("data", "fsdp", "context", "tensor")
"""Axes of the dense grid, slowest first."""
PARTS = ("", "_expert", "_expert_tensor")
"""What the mesh axes of expert_data, expert and expert_tensor append to the name of a dense axis; slowest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh: stages * data * fsdp * context * tensor devices, over which the experts' grid folds."""

    stages: int = 1
    """Pipeline stages."""
    data: int = -1
    """Data-parallel replicas of the parameters; -1 takes every device that the other axes leave."""
    fsdp: int = 1
    """Shards of parameters and optimizer state (the batch is cut over them too)."""
    context: int = 1
    """Pieces of a sequence; parameters are cut over them too."""
    tensor: int = 1
    """Shards of heads, hidden widths and vocabulary, and of positions between sublayers."""
    expert: int = 1
    """Groups of experts, folded over the axes above: it does not add devices; num_experts must be divisible by it."""
    expert_tensor: int = 1
    """Shards of the experts' hidden width, folded likewise."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.data != -1:
            yield from at_least(self, data=1)
        yield from at_least(self, stages=1, fsdp=1, context=1, tensor=1, expert=1, expert_tensor=1)

    @property
    def num_devices(self) -> int:
        """Devices of the mesh; with `data` = -1 the least it can do with."""
        return self.stages * max(self.data, 1) * self.fsdp * self.context * self.tensor

    def sizes(self, num_devices: int) -> dict[str, int]:
        """stages, data, fsdp, context, tensor, expert_data, expert, expert_tensor on `num_devices` devices.

        Raises ConfigError if the dense sizes do not multiply to the devices, or the expert grid does not fold.
        """
        rest = self.stages * self.fsdp * self.context * self.tensor
        data = num_devices // rest if self.data == -1 else self.data
        if data * rest != num_devices:
            divisors = [str(n) for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise ConfigError(
                f"mesh = ({self._asked('stages', *DENSE)}): the sizes must multiply to the {num_devices} devices here;"
                f" each axis can be one of {', '.join(divisors)}"
            )
        dense = {"data": data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}
        per_stage = num_devices // self.stages
        if not _folds(dense, self.expert, self.expert_tensor):
            legal = [n for n in range(1, per_stage + 1) if _folds(dense, n, self.expert_tensor)]
            fits = f"expert can be one of {', '.join(map(str, legal))}" if legal else "no size of expert does"
            raise ConfigError(
                f"mesh = ({self._asked('expert', 'expert_tensor')}): the experts' grid must fold over the {per_stage}"
                f" devices of {' * '.join(f'{name}={n}' for name, n in dense.items())}; with this expert_tensor {fits}"
            )
        parts = {"expert": self.expert, "expert_tensor": self.expert_tensor}
        return {"stages": self.stages} | dense | {"expert_data": per_stage // math.prod(parts.values())} | parts

    def factors(self, num_devices: int) -> dict[str, int]:
        """Size of every axis of the mesh: `stage`, and one for each pair of a dense and an expert axis."""
        sizes = self.sizes(num_devices)
        found = {"stage": self.stages} | {dense + part: 1 for dense in DENSE for part in PARTS}
        dense = [(name, sizes[name]) for name in reversed(DENSE)]
        folded = list(zip(reversed(PARTS), (self.expert_tensor, self.expert, sizes["expert_data"]), strict=True))
        for outer, inner, factor in _common(dense, folded):
            found[outer + inner] *= factor
        return found

    @property
    def known_factors(self) -> dict[str, int] | None:
        """Those of `factors` that no number of devices changes: all but `data`'s own. None if there are none yet, as
        experts fold over a `data` that takes what is left, or if the grids do not fold."""
        if self.data == -1 and self.expert * self.expert_tensor > self.fsdp * self.context * self.tensor:
            return None
        try:
            return self.factors(self.num_devices)
        except ConfigError:  # said where the mesh is made
            return None

    def _asked(self, *names: str) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


Axis = tuple[str, int]


def _common(a: list[Axis], b: list[Axis]) -> Iterator[tuple[str, str, int]]:
    """Factors common to two countings of the same devices, fastest first; ValueError if there are none."""
    a, b = list(a), list(b)
    while a and b:
        (name_a, size_a), (name_b, size_b) = a.pop(0), b.pop(0)
        small, large = sorted((size_a, size_b))
        if large % small:
            raise ValueError(f"{name_a} and {name_b} share no border")
        yield name_a, name_b, small
        if size_a > small:
            a.insert(0, (name_a, size_a // small))
        if size_b > small:
            b.insert(0, (name_b, size_b // small))


def _folds(dense: dict[str, int], expert: int, expert_tensor: int) -> bool:
    total = math.prod(dense.values())
    if total % (expert * expert_tensor):
        return False
    folded = [("expert_tensor", expert_tensor), ("expert", expert), ("", total // (expert * expert_tensor))]
    try:
        list(_common([(name, dense[name]) for name in reversed(DENSE)], folded))
    except ValueError:
        return False
    return True
