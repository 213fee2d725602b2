"""Host arrays onto the mesh: each process hands over the rows its devices own, and no others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

Index = tuple[slice, ...]


def local_rows(sharding: NamedSharding, shape: tuple[int, ...], dimension: int) -> list[int]:
    """The indices along `dimension` of an array of this global shape that live on this process's devices."""
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
        assert index is not None
        rows.update(range(*index[dimension].indices(shape[dimension])))
    return sorted(rows)


def place(
    arrays: Mapping[str, np.ndarray],
    sharding: NamedSharding,
    rows: Sequence[int] | None = None,
    dimension: int = 0,
    size: int | None = None,
) -> dict[str, jax.Array]:
    """Global arrays from host arrays that hold `rows` of `size` along `dimension` (default: all of them)."""
    if rows is None or size is None or len(rows) == size:
        return {name: _from(array, array.shape, sharding, lambda index: index) for name, array in arrays.items()}
    held = {row: position for position, row in enumerate(rows)}

    def to_local(index: Index) -> Index:
        first, last, _ = index[dimension].indices(size)
        return (*index[:dimension], slice(held[first], held[last - 1] + 1), *index[dimension + 1 :])

    def global_shape(array: np.ndarray) -> tuple[int, ...]:
        return (*array.shape[:dimension], size, *array.shape[dimension + 1 :])

    return {name: _from(array, global_shape(array), sharding, to_local) for name, array in arrays.items()}


def _from(
    array: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding, to_local: Callable[[Index], Index]
) -> jax.Array:
    def read(index: Any) -> np.ndarray:
        return array[to_local(index)]

    return jax.make_array_from_callback(shape, sharding, read)


def from_host(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A global array from one that every process holds whole, on whatever device."""
    whole = np.asarray(leaf)
    return _from(whole, whole.shape, sharding, lambda index: index)
