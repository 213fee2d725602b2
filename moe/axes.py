"""Logical axes -> mesh axes: the one closed table, and the one place that knows the mesh.

The mesh has four axes. `data` replicates parameters and cuts the batch; `fsdp` cuts the batch and the parameters
(ZeRO-3); `expert` cuts the batch and the experts; `tensor` cuts heads, hidden widths and the vocabulary. So the batch
is cut over `data x fsdp x expert`, and every other choice is a row of TABLE. A name that is not in the table raises: no
parameter is ever replicated because somebody misspelt an axis.

Axes are `Auto`: XLA's partitioner places the collectives, except in `moe.dispatch.sharded`, which places its own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.config import ConfigError, at_least

DATA, FSDP, EXPERT, TENSOR = MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = (DATA, FSDP, EXPERT)

TABLE: dict[str, tuple[str, ...] | str | None] = {
    "batch": BATCH_AXES,  # sequences
    "position": None,  # S; context parallelism will cut it
    "embed": FSDP,  # D of a parameter
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_width": None,
    "mlp": TENSOR,  # F of a dense MLP or a shared expert
    "experts": EXPERT,
    "expert_mlp": TENSOR,  # F of an expert
    "router_experts": None,  # E of a router: every device scores every expert
    "memory_slots": None,  # rows of a memory's table: every device holds a slice of each row
    "memory_width": (FSDP, EXPERT, TENSOR),  # D of such a table
    "memory_batch": DATA,  # sequences, while a memory is read: the axes that cut its width cannot cut them too
    "memory_slice": (FSDP, EXPERT),  # D on the way between the two: without it XLA replicates what it moves
    "norm": None,
    "accumulation": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices."""

    data: int = -1
    """Data-parallel replicas; -1 takes every device that the other axes leave."""
    fsdp: int = 1
    """Shards of parameters and optimizer state (the batch is cut over them too)."""
    expert: int = 1
    """Expert-parallel groups; num_experts must be divisible by it."""
    tensor: int = 1
    """Shards of heads, hidden widths and vocabulary."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.data != -1:
            yield from at_least(self, data=1)
        yield from at_least(self, fsdp=1, expert=1, tensor=1)

    def sizes(self, num_devices: int) -> tuple[int, int, int, int]:
        """(data, fsdp, expert, tensor) on `num_devices` devices; ConfigError if they do not factor it."""
        rest = self.fsdp * self.expert * self.tensor
        data = num_devices // rest if self.data == -1 else self.data
        if data * rest != num_devices:
            asked = f"data={self.data}, fsdp={self.fsdp}, expert={self.expert}, tensor={self.tensor}"
            divisors = [str(n) for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise ConfigError(
                f"mesh = ({asked}): the sizes must multiply to the {num_devices} devices here;"
                f" each axis can be one of {', '.join(divisors)}"
            )
        return data, self.fsdp, self.expert, self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them), neighbours in `tensor` closest."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of a tensor whose dimensions carry these logical axes (None: not cut)."""
    parts: list[Any] = []
    used: set[str] = set()
    for axis in axes:
        if axis is not None and axis not in TABLE:
            raise KeyError(f"logical axis {axis!r} is not in the table of moe/axes.py: {', '.join(sorted(TABLE))}")
        target = None if axis is None else TABLE[axis]
        names = (target,) if isinstance(target, str) else target or ()
        if clash := used.intersection(names):
            raise ValueError(f"axes {tuple(axes)} put mesh axis {clash.pop()!r} on two dimensions of one tensor")
        used.update(names)
        parts.append(target)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def mesh_in_use() -> bool:
    """Whether a mesh is set (`with jax.set_mesh(mesh)`); without one every layer runs on one device as plain JAX."""
    return not jax.sharding.get_abstract_mesh().empty


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States the sharding of an activation at a block boundary; the identity without a mesh."""
    return jax.lax.with_sharding_constraint(x, spec(axes)) if mesh_in_use() else x
