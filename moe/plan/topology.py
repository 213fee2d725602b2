"""Devices of chips that are not here: "v5p:4x4x8" -> 128 devices that programs can be compiled for, not run on.

The compilers are those of libtpu (`pip install "moe[tpu]"`) and of the CUDA plugin (`pip install "moe[gpu]"`); neither
needs its hardware. A leading `N*` asks for N slices, joined by the data-centre network.
"""

import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from moe.config import ConfigError
from moe.plan.chips import Chip, chip

_FORM = re.compile(r"(?:(\d+)\*)?([\w]+):(\d+(?:x\d+)*)")
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
"""Chips in the largest slice."""
_GPU_TEXT = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {cache}
clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}" """
_L2_CACHE = {"h100": 52_428_800, "h200": 62_914_560}


class Topology(NamedTuple):
    """What a name like "2*v5p:4x4x8" asks for."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis of the torus of a slice; of GPUs, hosts and devices of a host."""
    slices: int

    @property
    def num_devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.devices

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Topology:
    """The topology of this name; ConfigError with the nearest legal ones if there is none."""
    found = _FORM.fullmatch(name)
    if found is None:
        raise ConfigError(f"topology = {name!r}: must be [SLICES*]CHIP:SHAPE, as in v5p:4x4x8, 2*v6e:16x16 or h200:2x8")
    slices, kind, shape = int(found[1] or 1), chip(found[2]), tuple(map(int, found[3].split("x")))
    if kind.name == "v4":
        raise ConfigError(
            f"topology = {name!r}: cannot be compiled for: the compiler takes the cores of a v4 chip apart"
        )
    if kind.platform == "cuda":
        if kind.name not in _L2_CACHE:
            raise ConfigError(f"topology = {name!r}: of GPUs must be one of {', '.join(_L2_CACHE)}")
        if len(shape) != 2 or slices < 1 or min(shape) < 1 or shape[1] > 8:
            raise ConfigError(f"topology = {name!r}: must be HOSTSxDEVICES, at most 8 devices a host, as in h200:2x8")
        return Topology(kind, shape, slices)
    legal = list(shapes(kind))
    if shape not in legal or slices < 1:
        size = math.prod(shape)
        nearest = sorted(
            legal, key=lambda one: (abs(math.log(math.prod(one) / max(size, 1))), one != tuple(sorted(shape)))
        )
        names = ", ".join(f"{kind.name}:{'x'.join(map(str, one))}" for one in nearest[:4])
        raise ConfigError(f"topology = {name!r}: is no slice of {kind.name}; the nearest are {names}")
    return Topology(kind, shape, slices)


def shapes(kind: Chip) -> Iterator[tuple[int, ...]]:
    """Slices of a TPU that are offered: fixed ones of a flat torus; of a deep one small ones and blocks of 4x4x4."""
    if kind.axes == 2:
        yield from (tuple(map(int, text.split("x"))) for text in _FLAT)
        return
    yield from (tuple(map(int, text.split("x"))) for text in _SMALL)
    for shape in itertools.combinations_with_replacement(range(4, 49, 4), 3):
        if math.prod(shape) <= _MOST[kind.name]:
            yield shape


def devices(topology: Topology) -> list[jax.Device]:
    """Its devices, for `jax.jit(...).lower(...).compile()`; ConfigError if the compiler is not installed."""
    return _gpus(topology) if topology.chip.platform == "cuda" else _tpus(topology)


def _tpus(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f'topology = {str(topology)!r}: needs the TPU compiler: pip install "moe[tpu]"')
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology = {str(topology)!r}: the TPU compiler refuses: {_first_line(error)}") from error


def _gpus(topology: Topology) -> list[jax.Device]:
    kind, (hosts, each) = topology.chip, topology.shape
    text = _GPU_TEXT.format(
        bandwidth=round(kind.hbm_bandwidth), cache=_L2_CACHE[kind.name], memory=kind.hbm, name=kind.device_kind
    )
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind.name, target_config=text, topology=f"{topology.slices}x{hosts}x{each}"
        )
    except NotImplementedError as error:  # what JAX says without the plugin
        raise ConfigError(
            f'topology = {str(topology)!r}: needs the CUDA compiler: pip install "moe[gpu]" ({_first_line(error)})'
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"topology = {str(topology)!r}: the CUDA compiler refuses: {_first_line(error)}") from error
    return list(described.devices)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
