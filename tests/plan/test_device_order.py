"""Devices on the mesh: fast axes over fast links, only stages, data and fsdp across slices."""

import dataclasses
import itertools
from typing import Any

import pytest

from moe.axes import MeshConfig
from moe.config import ConfigError
from moe.plan.device_order import in_mesh_order


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a `jax.Device` as an order depends on."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    slice_index: int = 0


def torus(*sides: int, slice_index: int = 0, first: int = 0) -> list[Any]:
    places = itertools.product(*(range(side) for side in reversed(sides)))
    return [
        Device(first + number, coords=place[::-1], slice_index=slice_index, process_index=(first + number) // 4)
        for number, place in enumerate(places)
    ]


def distance(one: Device, other: Device, sides: tuple[int, ...]) -> int:
    """Links between two chips, around the torus where that is shorter."""
    steps = (abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))
    return sum(min(step, side - step) for step, side in zip(steps, sides, strict=True))


def test_every_device_has_one_place_and_fast_axes_are_rings_of_links() -> None:
    devices = torus(4, 4, 4)
    order = in_mesh_order(MeshConfig(data=4, fsdp=4, tensor=4), devices)
    assert sorted(device.id for device in order) == list(range(64))
    for stride in (1, 4, 16):  # tensor, fsdp, data
        ring = [order[index * stride] for index in range(4)]
        assert all(distance(a, b, (4, 4, 4)) == 1 for a, b in zip(ring, [*ring[1:], ring[0]], strict=True))


def test_slices_lie_along_data_first() -> None:
    devices = [*torus(2, 2, 1), *torus(2, 2, 1, slice_index=1, first=4)]
    order = in_mesh_order(MeshConfig(data=2, fsdp=4, expert=4), devices[::-1])
    assert [device.slice_index for device in order] == [0] * 4 + [1] * 4


def test_slices_lie_along_the_outer_part_of_fsdp_if_data_is_too_small() -> None:
    devices = [one for index in range(2) for one in torus(2, 2, 2, slice_index=index, first=8 * index)]
    order = in_mesh_order(MeshConfig(data=1, fsdp=16, expert=8), devices)
    assert [device.slice_index for device in order] == [0] * 8 + [1] * 8


def test_experts_do_not_cross_slices() -> None:
    devices = [one for index in range(2) for one in torus(2, 2, 1, slice_index=index, first=4 * index)]
    with pytest.raises(ConfigError, match="2 slices must divide stages"):
        in_mesh_order(MeshConfig(data=1, fsdp=8, expert=8), devices)


def test_other_devices_stand_by_host() -> None:
    devices: list[Any] = [
        Device(number, platform="cuda", device_kind="NVIDIA H200", process_index=number % 2) for number in range(8)
    ]
    order = in_mesh_order(MeshConfig(data=2, tensor=4), devices)
    assert [device.process_index for device in order] == [0] * 4 + [1] * 4
