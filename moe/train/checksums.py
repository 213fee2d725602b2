"""A checksum of every leaf of a state: one changed bit, or two elements that changed places, change it.

An element at the position p of the flattened whole array, with the bits b, is hashed to

    h(b, p) = mix(b xor (p + 1) * 2654435769 mod 2^32)

and the checksum of a leaf is the sum of its hashes mod 2^32. `mix` is a bijection of 32-bit numbers whose every output
bit depends on every input bit; integers add up to the same sum in any order. So the checksum does not depend on what
cuts the leaf, in which order it is reduced, or on how many processes hold it. Elements of 8 bytes are two of 4, smaller
ones are widened; positions count mod 2^32. Another value passes unseen with probability 2^-32.

Every device reads its own part once, where it lies; leaves in the host's memory are fetched tile by tile. What the
parts add is summed on the host.
Collectives: a gather of one uint32 a device and leaf, where there are several processes.
Source: `mix` is the finalizer of MurmurHash3 (Appleby 2011). Differs from it: nothing is chained, so it can be cut.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moe.models.remat import HOST
from moe.optim.tiled import tile_of

_TILE = 1 << 20
"""Elements of a leaf in host memory that are fetched at once."""


def names(tree: Any) -> list[str]:
    """The dotted path of every leaf, in the order of `jax.tree.leaves`."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every leaf by its path, the same on all processes; waits until the values are there."""
    leaves, out = jax.tree.leaves(tree), {}
    for name, leaf, column in zip(names(tree), leaves, table(leaves).T, strict=True):
        parts = by_replica(leaf.sharding, column)[0]  # of equal parts the first counts
        out[name] = int(parts.sum(dtype=np.uint32))
    return out


def table(tree: Any) -> np.ndarray:
    """uint32 [devices of the mesh, leaves], the same on all processes: what the parts of every device add."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return np.zeros((1, 0), np.uint32)
    found = _compiled(tuple(leaf.sharding for leaf in leaves))(leaves)
    return np.asarray(found if found.is_fully_addressable else multihost_utils.process_allgather(found, tiled=True))


def by_replica(sharding: Any, column: np.ndarray) -> np.ndarray:
    """A value for every device of the mesh as [replica, part]: what stands in one row makes up the whole leaf."""
    if not isinstance(sharding, NamedSharding):
        return column.reshape(1, -1)
    mesh = sharding.mesh
    cut = set(sum(_cuts(sharding.spec, len(sharding.spec)), ()))
    order = [i for i, name in enumerate(mesh.axis_names) if name not in cut]
    rest = [i for i, name in enumerate(mesh.axis_names) if name in cut]
    replicas = math.prod(mesh.devices.shape[i] for i in order)
    return column.reshape(mesh.devices.shape).transpose(order + rest).reshape(replicas, -1)


@functools.cache
def _compiled(shardings: tuple[Any, ...]) -> Any:
    """The jitted function of all leaves."""
    on_host = [sharding.memory_kind == HOST for sharding in shardings]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    if not meshes:  # all on one device

        def alone(leaves: list[jax.Array]) -> jax.Array:
            plain = zip(map(_plain, leaves), on_host, strict=True)
            return jnp.stack([_part(x, x.shape, (0,) * x.ndim, host) for x, host in plain])[None]

        return jax.jit(alone)
    (mesh,) = meshes
    assert all(isinstance(sharding, NamedSharding) for sharding in shardings), "some leaves lie outside the mesh"
    specs = [sharding.spec for sharding in shardings]

    def over(leaves: list[jax.Array]) -> jax.Array:
        plain = [_plain(leaf) for leaf in leaves]
        shapes = [leaf.shape for leaf in plain]

        def local(parts: list[jax.Array]) -> jax.Array:
            found = []
            for part, shape, spec, host in zip(parts, shapes, specs, on_host, strict=True):
                cuts = _cuts(spec, len(shape))
                start = [_index(axes) * size for axes, size in zip(cuts, part.shape, strict=True)]
                found.append(_part(part, shape, start, host))
            return jnp.stack(found)[None]

        # Of a replicated leaf every device has a value of its own to say, so it cannot be declared what varies.
        mapped: Any = jax.shard_map(
            local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(mesh.axis_names), check_vma=False
        )
        return mapped(plain)

    return jax.jit(over)


def _plain(leaf: jax.Array) -> jax.Array:
    """A random key's numbers, anything else as it is."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _cuts(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """For every dimension the mesh axes that cut it."""
    parts = [*spec, *([None] * (ndim - len(spec)))]
    return [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in parts]


def _index(axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def _part(x: jax.Array, shape: tuple[int, ...], start: Sequence[Any], host: bool) -> jax.Array:
    """Sum of the hashes of the part `x`, which begins at `start` in a whole of `shape`."""
    if not host or not x.ndim:
        return _sum(jax.device_put(x, jax.memory.Space.Device) if host else x, shape, start)
    tile = tile_of(x.shape, _TILE)
    grid = tuple(size // part for size, part in zip(x.shape, tile, strict=True))

    def body(index: jax.Array, found: jax.Array) -> jax.Array:
        corner = [number * size for number, size in zip(jnp.unravel_index(index, grid), tile, strict=True)]
        fetched = jax.device_put(jax.lax.dynamic_slice(x, corner, tile), jax.memory.Space.Device)
        return found + _sum(fetched, shape, [a + b for a, b in zip(start, corner, strict=True)])

    return jax.lax.fori_loop(0, math.prod(grid), body, jnp.uint32(0))


@functools.partial(jax.jit, static_argnums=1)  # traced once for a parameter and its moments
def _sum(x: jax.Array, shape: tuple[int, ...], start: Sequence[Any]) -> jax.Array:
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dimension in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension) + jnp.asarray(start[dimension], jnp.uint32)
        position += along * jnp.uint32(stride % 2**32)
        stride *= shape[dimension]
    bits = _bits(x)
    if bits.ndim > x.ndim:  # 8 bytes: two halves, each with a position of its own
        halves = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, x.ndim)
        position = position[..., None] * 2 + halves
    return jnp.sum(_mix(bits ^ ((position + 1) * jnp.uint32(2654435769))), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of every element as uint32, of 8 bytes as two in a last dimension."""
    if x.dtype == jnp.bool_ or (x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.integer)):
        return x.astype(jnp.uint8).astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
