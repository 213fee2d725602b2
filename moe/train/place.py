"""Host arrays onto the mesh: each process hands over the rows its devices own, and no others."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, shape: tuple[int, ...], dimension: int) -> list[int]:
    """The indices along `dimension` of an array of this global shape that live on this process's devices."""
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
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
        return {
            name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
            for name, array in arrays.items()
        }
    start = {row: position for position, row in enumerate(rows)}

    def one(array: np.ndarray) -> jax.Array:
        shape = array.shape[:dimension] + (size,) + array.shape[dimension + 1 :]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[dimension].indices(size)
            local = slice(start[first], start[last - 1] + 1)
            return array[index[:dimension] + (local,) + index[dimension + 1 :]]

        return jax.make_array_from_callback(shape, sharding, read)

    return {name: one(array) for name, array in arrays.items()}
