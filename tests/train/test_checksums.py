"""A checksum sees every changed bit and every exchange, and does not see what cuts the leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from moe.models.remat import HOST
from moe.train import checksums as module
from moe.train.checksums import checksums, names

MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, jnp.uint8, jnp.bool_)


def oracle(value: np.ndarray) -> int:
    """The formula of the module, one element at a time, in Python's integers."""
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}").tolist()
    total = 0
    for position, b in enumerate(bits):
        x = b ^ ((position + 1) * 2654435769 % 2**32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        total += x ^ (x >> 16)
    return total % 2**32


def of(value: Any) -> int:
    (found,) = checksums([jnp.asarray(value)]).values()
    return found


def of_each(values: list[np.ndarray]) -> list[int]:
    """As `of`, of many values of one shape at once."""
    found: list[int] = jax.vmap(lambda x: module._sum(x, x.shape, (0,) * x.ndim))(jnp.stack(values)).tolist()
    assert found[0] == of(values[0])
    return found


def drawn(dtype: Any, shape: tuple[int, ...] = (8, 12)) -> np.ndarray:
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    raw = np.random.default_rng(3).integers(0, 2 if dtype == jnp.bool_ else 256, size, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_it_is_the_formula_whatever_cuts_the_leaf(dtype: Any) -> None:
    value = drawn(dtype)
    specs = ((), ("a",), (None, "b"), ("a", "b"), (("a", "b"),), (("b", "a"), None))
    leaves = {str(spec): jax.device_put(value, NamedSharding(MESH, PartitionSpec(*spec))) for spec in specs}
    assert set(checksums(leaves).values()) == {oracle(value)}
    assert of(jax.device_put(value, SingleDeviceSharding(jax.devices()[3]))) == oracle(value)


def test_leaves_in_host_memory_are_hashed_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 24)  # 8 tiles of a device's [4, 4, 6]
    value = drawn(jnp.float32, (4, 16, 6))
    sharding = NamedSharding(MESH, PartitionSpec(None, "b"), memory_kind=HOST)
    scalar = jax.device_put(jnp.int32(3), NamedSharding(MESH, PartitionSpec(), memory_kind=HOST))
    found = checksums({"moment": jax.device_put(value, sharding), "count": scalar})
    assert found == {"count": oracle(np.array(3, np.int32)), "moment": oracle(value)}


def test_every_leaf_has_its_path_and_keys_and_scalars_are_leaves() -> None:
    key = jax.random.key(5)
    tree = {"params": {"w": jnp.ones(3)}, "opt_state": (jnp.int32(1), None), "key": key}
    assert names(tree) == ["key", "opt_state.0", "params.w"]
    assert checksums(tree)["key"] == oracle(np.asarray(jax.random.key_data(key)))
    assert checksums(tree)["key"] != checksums({"key": jax.random.key(6)})["key"]
    assert checksums({}) == {} and of(np.zeros((0, 4), np.float32)) == 0


def test_every_changed_bit_is_seen() -> None:
    value = drawn(jnp.uint32, (4, 8))
    changed = [value.copy() for _ in range(value.size * 32)]
    for index, one in enumerate(changed):
        one.reshape(-1)[index // 32] ^= np.uint32(1 << index % 32)
    assert len(set(of_each([value, *changed]))) == 1 + len(changed)


@pytest.mark.parametrize("values", ["drawn", "counted", "small"])
def test_every_exchange_of_two_elements_is_seen(values: str) -> None:
    start = {"drawn": drawn(jnp.float32, (40,)), "counted": np.arange(40.0), "small": np.arange(40) % 2 + 1.0}[values]
    start = start.astype(np.float32)
    changed = [start]
    for i in range(40):
        for j in range(i):
            if start[i] != start[j]:
                other = start.copy()
                other[[i, j]] = start[[j, i]]
                changed.append(other)
    first, *others = of_each(changed)
    assert first not in others


def test_what_keeps_a_plain_sum_of_bits_changes_it() -> None:
    value = drawn(jnp.float32, (6, 6))
    others = [value.T, -value, value[::-1], np.roll(value, 1), np.roll(value, 1, axis=1), np.sort(value)]
    others += [value * np.float32(2), np.zeros_like(value), -np.zeros_like(value)]
    assert len({of(one) for one in (value, *others)}) == 1 + len(others)
