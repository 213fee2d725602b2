"""Host rows onto the mesh: which rows a process hands over, and that they land where they belong."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import axes
from moe.axes import MeshConfig
from moe.train.place import local_rows, place
from moe.train.step import BATCH_LOGICAL

A, G, S = 2, 16, 3
SHAPE = (A, G, S)
ARRAYS = {
    "tokens": np.arange(A * G * S, dtype=np.int32).reshape(SHAPE),
    "weights": -np.arange(A * G * S, dtype=np.float32).reshape(SHAPE),
}


def mesh_of(**sizes: int) -> Mesh:
    config = MeshConfig(**({"data": 1} | sizes))
    return axes.make_mesh(config, jax.devices()[: config.num_devices])


class OneProcess:
    """A sharding as a process sees it that owns some of its devices: what `local_rows` asks on several hosts."""

    def __init__(self, sharding: NamedSharding, devices: list[jax.Device]):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in self.devices}


@pytest.mark.parametrize("sizes", [{}, {"data": 8}, {"fsdp": 4, "tensor": 2, "expert": 2}, {"tensor": 8}], ids=str)
def test_one_process_owns_every_row_whatever_the_mesh(sizes: dict[str, int]) -> None:
    sharding = axes.sharding(mesh_of(**sizes), BATCH_LOGICAL)
    assert local_rows(sharding, SHAPE, 1) == list(range(G))
    assert local_rows(sharding, SHAPE, 0) == list(range(A))


def test_a_process_owns_the_rows_of_its_devices() -> None:
    sharding = axes.sharding(mesh_of(data=4, tensor=2), BATCH_LOGICAL)
    devices = list(jax.devices())
    halves = [local_rows(OneProcess(sharding, part), SHAPE, 1) for part in (devices[:4], devices[4:])]
    assert halves == [list(range(8)), list(range(8, 16))]
    # Devices 0 and 1 differ in `tensor` only: the same rows, once.
    assert local_rows(OneProcess(sharding, devices[:2]), SHAPE, 1) == [0, 1, 2, 3]
    # Rows need not be neighbours.
    apart = local_rows(OneProcess(sharding, [devices[0], devices[6]]), SHAPE, 1)
    assert apart == [0, 1, 2, 3, 12, 13, 14, 15]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2, "expert": 2}, {"tensor": 8}], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
def test_all_rows_placed_are_the_array_itself(sizes: dict[str, int], explicit: bool) -> None:
    sharding = axes.sharding(mesh_of(**sizes), BATCH_LOGICAL)
    rows = {"rows": range(G), "dimension": 1, "size": G} if explicit else {}
    placed = place(ARRAYS, sharding, **rows)
    for name, array in ARRAYS.items():
        assert placed[name].sharding.is_equivalent_to(sharding, 3) and placed[name].dtype == array.dtype
        np.testing.assert_array_equal(placed[name], array)


@pytest.mark.parametrize("dimension", [0, 1])
def test_some_rows_become_an_array_of_the_full_size(dimension: int) -> None:
    """A mesh of the process's own devices, and its rows of a batch: the callback is asked for global indices."""
    devices = np.asarray(jax.devices()[:4])
    cut = NamedSharding(Mesh(devices, ("rows",)), PartitionSpec(*(None,) * dimension, "rows"))
    rows = [4, 5, 6, 7, 8, 9, 10, 11]
    whole = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    held = whole.take(rows, axis=dimension)
    asked: dict[tuple, np.ndarray] = {}

    def callback(shape: tuple[int, ...], sharding: NamedSharding, read: object) -> tuple[int, ...]:
        for device, index in sharding.devices_indices_map(shape).items():
            if index[dimension].start in (4, 8):  # devices 1 and 2: those this process owns
                asked[device.id] = read(index)  # type: ignore[operator]
        return shape

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", callback)
        shapes = place({"x": held}, cut, rows, dimension, 16)
    assert shapes == {"x": (16, 16)}
    np.testing.assert_array_equal(asked[1], whole.take(range(4, 8), axis=dimension))
    np.testing.assert_array_equal(asked[2], whole.take(range(8, 12), axis=dimension))


def test_a_row_that_is_not_held_is_an_error() -> None:
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:2]), ("rows",)), PartitionSpec("rows"))
    with pytest.raises(KeyError):
        place({"x": np.zeros((2, 3))}, sharding, [0, 1], 0, 4)
