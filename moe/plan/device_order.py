"""In which order devices are laid on the mesh, so that its fast axes run over fast links.

The mesh of `moe.axes` is a reshape of a list of devices, slowest axis first. On one TPU slice the list is arranged so
that every mesh axis is a ring or a sub-torus of links (`jax.experimental.mesh_utils`). Slices, which only the
data-centre network joins, are laid along the slowest axes: stages, data, then fsdp. Other devices stand by host, so
that the fastest axes stay inside a host.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from moe.axes import DATA, FSDP, MESH_AXES, STAGE, MeshConfig
from moe.config import ConfigError

ACROSS_SLICES = (STAGE, DATA[0], FSDP[0])
"""Mesh axes that may cross slices: those that exchange nothing, or only parameters and their gradients."""


def in_mesh_order(config: MeshConfig, devices: Sequence[jax.Device]) -> list[jax.Device]:
    """`devices` in the order in which `moe.axes.make_mesh` takes them; ConfigError if slices do not fit the mesh."""
    sizes = config.factors(len(devices))
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    inside, outside = dict(sizes), dict.fromkeys(MESH_AXES, 1)
    left = len(slices)
    for name in ACROSS_SLICES:
        outside[name] = math.gcd(left, sizes[name])
        inside[name] //= outside[name]
        left //= outside[name]
    if left > 1:
        crossing = ", ".join(f"{name}={sizes[name]}" for name in ACROSS_SLICES)
        raise ConfigError(
            f"mesh: {len(slices)} slices must divide stages * data * fsdp, as far as experts do not fold over them"
            f" ({crossing}): only these axes may cross slices"
        )
    shape = [inside[name] for name in MESH_AXES]
    blocks = [_in_slice(slices[index], shape) for index in sorted(slices)]
    # [slices..., inside...] -> for every axis its part across slices before its part inside.
    outer = [outside[name] for name in MESH_AXES]
    whole = np.array(blocks, dtype=object).reshape(*outer, *shape)
    order = [axis for pair in zip(range(len(outer)), range(len(outer), 2 * len(outer)), strict=True) for axis in pair]
    return list(whole.transpose(order).reshape(-1))


def _in_slice(devices: list[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """The devices of one slice as an array of this shape."""
    if devices[0].platform != "tpu":
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        return np.array(ordered, dtype=object).reshape(shape)
    used = [size for size in shape if size > 1] or [1]
    mesh = mesh_utils.create_device_mesh(used, devices, allow_split_physical_axes=True)
    return np.asarray(mesh, dtype=object).reshape(shape)
