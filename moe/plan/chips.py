"""Accelerators by name: memory, peak rates and links. All numbers are per device of JAX, not per chip.

Source: read, not measured, but for `usable`: the "Key specifications" pages of cloud.google.com/tpu/docs for each TPU
(memory, peak bfloat16, memory and inter-chip bandwidth); Austin et al., "How to scale your model" (2025), chapter on
TPUs, for one-way bandwidth of a link and of the data-centre network; NVIDIA's data sheets, without sparsity. `usable`
of TPUs is measured: the memory that libtpu 0.0.42's compiler says it has when a program asks for more.
Differs from the sources: a TPU7x chip is two devices of JAX, each with half of it.
"""

import dataclasses

from moe.config import ConfigError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of JAX on this kind of chip."""

    name: str
    platform: str
    """tpu or cuda."""
    device_kind: str
    """`jax.Device.device_kind`, as `moe.plan.flops.peak_flops` reads it."""
    devices: int = 1
    """Devices of JAX on one chip."""
    hbm: int
    """Bytes of memory."""
    usable: int
    """Bytes that a program can have: of a TPU, what its compiler allows; of a GPU, 75 %, JAX's default."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s one way: of one inter-chip link of a TPU, of all NVLinks of a GPU together."""
    axes: int
    """Axes of the torus of links: a ring uses two links of its axis. 0: all devices of a host reach each other."""
    dcn_bandwidth: float
    """Bytes/s one way of a device's share of the network between slices (TPU) or hosts (GPU)."""


def _tpu(
    name: str, kind: str, *, gib: float, usable: float, tflops: float, hbm: float, link: float, **rest: float
) -> Chip:
    known = {"devices": 1, "axes": 3, "dcn": 6.25} | rest
    return Chip(
        name=name,
        platform="tpu",
        device_kind=kind,
        devices=int(known["devices"]),
        hbm=round(gib * GIB),
        usable=round(usable * GIB),
        flops=tflops * 1e12,
        hbm_bandwidth=hbm * 1e9,
        link_bandwidth=link * 1e9,
        axes=int(known["axes"]),
        dcn_bandwidth=known["dcn"] * 1e9,
    )


def _gpu(name: str, kind: str, *, memory: int, tflops: float, hbm: float, link: float, dcn: float) -> Chip:
    return Chip(
        name=name,
        platform="cuda",
        device_kind=kind,
        hbm=memory,
        usable=memory * 3 // 4,
        flops=tflops * 1e12,
        hbm_bandwidth=hbm * 1e9,
        link_bandwidth=link * 1e9,
        axes=0,
        dcn_bandwidth=dcn * 1e9,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", gib=32, usable=30.5, tflops=275, hbm=1228, link=45),
        _tpu("v5e", "TPU v5 lite", gib=16, usable=15.75, tflops=197, hbm=819, link=45, axes=2, dcn=3.125),
        _tpu("v5p", "TPU v5", gib=95.74, usable=95.74, tflops=459, hbm=2765, link=90),
        _tpu("v6e", "TPU v6 lite", gib=32, usable=31.25, tflops=918, hbm=1640, link=90, axes=2, dcn=12.5),
        _tpu("tpu7x", "TPU7x", devices=2, gib=96, usable=94.75, tflops=2307 / 2, hbm=7380 / 2, link=90, dcn=6.25),
        _gpu("h100", "NVIDIA H100 80GB HBM3", memory=85_045_870_592, tflops=989, hbm=3350, link=450, dcn=50),
        _gpu("h200", "NVIDIA H200", memory=150_754_820_096, tflops=989, hbm=4800, link=450, dcn=50),
        _gpu("b200", "NVIDIA B200", memory=192_000_000_000, tflops=2250, hbm=8000, link=900, dcn=50),
    )
}


def chip(name: str) -> Chip:
    """The chip of this name; ConfigError with the known ones if there is none."""
    if name not in CHIPS:
        raise ConfigError(f"chip = {name!r}: must be one of {', '.join(CHIPS)}")
    return CHIPS[name]
