"""Two grids over the same devices: which sizes fold, and that the mesh is both countings at once."""

import itertools
import math

import jax
import numpy as np
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.folding import DENSE


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_sizes_fill_in_the_data_axis(devices: int) -> None:
    assert MeshConfig().sizes(devices) == {
        "stages": 1, "data": devices, "fsdp": 1, "context": 1, "tensor": 1, "expert_data": devices, "expert": 1,
        "expert_tensor": 1,
    }  # fmt: skip
    assert axes.make_mesh(MeshConfig(), jax.devices()[:devices]).size == devices
    assert MeshConfig(stages=2, fsdp=2, expert=4).sizes(8)["data"] == 2


def test_experts_fold_over_the_dense_axes_without_adding_devices() -> None:
    config = MeshConfig(data=4, fsdp=2, tensor=2, expert=4, expert_tensor=2)
    assert config.num_devices == 16 and config.sizes(16)["expert_data"] == 2
    used = {name: size for name, size in config.factors(16).items() if size > 1}
    assert used == {"tensor_expert_tensor": 2, "fsdp_expert": 2, "data_expert": 2, "data": 2}


ALL = [dict(zip(DENSE, sizes, strict=True)) for sizes in itertools.product((1, 2, 3, 4, 6), repeat=4)]


def digits(number: int, sizes: list[int]) -> list[int]:
    """`number` counted in places of these sizes, the last one fastest."""
    found = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return found[::-1]


def test_the_mesh_counts_the_devices_as_both_grids_do() -> None:
    """Over every small dense grid and every expert grid that folds: brute force."""
    folded = 0
    for dense in (sizes for sizes in ALL if math.prod(sizes.values()) <= 24):
        total = math.prod(dense.values())
        for expert, expert_tensor in itertools.product((1, 2, 3, 4, 6, 8), repeat=2):
            config = MeshConfig(**dense, expert=expert, expert_tensor=expert_tensor)
            try:
                sizes = config.factors(total)
            except ConfigError:
                continue
            folded += 1
            where = np.indices([sizes[name] for name in axes.MESH_AXES]).reshape(len(sizes), -1)
            at = dict(zip(axes.MESH_AXES, where, strict=True))

            def index(names: tuple[str, ...], sizes: dict[str, int] = sizes, at: dict = at) -> np.ndarray:
                return np.ravel_multi_index([at[name] for name in names], [sizes[name] for name in names])

            dense_grid = [index(names) for names in (axes.DATA, axes.FSDP, axes.CONTEXT, axes.TENSOR)]
            expert_grid = [index(names) for names in (axes.EXPERT_DATA, axes.EXPERT, axes.EXPERT_TENSOR)]
            parts = [total // expert // expert_tensor, expert, expert_tensor]
            assert np.array(dense_grid).T.tolist() == [digits(n, list(dense.values())) for n in range(total)]
            assert np.array(expert_grid).T.tolist() == [digits(n, parts) for n in range(total)]
    assert folded > 500


def test_sizes_that_do_not_factor_the_devices_are_answered_with_those_that_do() -> None:
    asked = r"mesh = \(stages=1, data=-1, fsdp=3, context=1, tensor=1\)"
    with pytest.raises(ConfigError, match=asked + r": .* 8 devices here; each axis can be one of 1, 2, 4, 8$"):
        MeshConfig(fsdp=3).sizes(8)
    for config in (MeshConfig(data=2), MeshConfig(data=4, tensor=4), MeshConfig(data=1), MeshConfig(stages=3)):
        with pytest.raises(ConfigError, match="8 devices"):
            config.sizes(8)


@pytest.mark.parametrize(
    ("config", "devices", "legal"),
    [
        (MeshConfig(fsdp=8, expert=3), 8, "1, 2, 4, 8"),
        (MeshConfig(fsdp=8, expert=16), 8, "1, 2, 4, 8"),
        (MeshConfig(fsdp=2, tensor=3, expert=2), 6, "1, 3, 6"),  # tensor is the faster counting: 2 breaks it
        (MeshConfig(fsdp=4, tensor=2, expert=4, expert_tensor=4), 8, "1, 2"),
    ],
)
def test_an_expert_grid_that_does_not_fold_is_answered_with_the_sizes_that_do(
    config: MeshConfig, devices: int, legal: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.sizes(devices)
    said = str(caught.value)
    assert f"expert={config.expert}, expert_tensor={config.expert_tensor}" in said
    assert said.endswith(f"with this expert_tensor expert can be one of {legal}")


def test_an_expert_tensor_that_never_folds_is_said_to() -> None:
    with pytest.raises(ConfigError, match="no size of expert does"):
        MeshConfig(fsdp=2, tensor=3, expert_tensor=4).sizes(6)


@pytest.mark.parametrize("field", ["stages", "data", "fsdp", "context", "tensor", "expert", "expert_tensor"])
@pytest.mark.parametrize("value", [0, -2])
def test_a_size_below_one_is_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^mesh\.{field} = {value}: must be at least 1$"):
        check(MeshConfig(**{field: value}), "mesh")
