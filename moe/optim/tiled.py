"""An optimizer's update tile by tile: its float32 temporaries stay small, and its moments may wait in host memory.

Once the norm of all gradients is known, every operation is element by element, so a parameter can be updated in pieces:

    for each parameter, for each tile of it:  moments from the host;  clip, transform, apply;  moments back to the host

A loop over tiles updates parameter and moments in place, so beside them and the gradients only one tile's temporaries
live on the device. Every device updates its own slices (`shard_map`), whatever cuts them, so tiles move nothing between
devices. Operation by operation it is the update of the whole; compiled, parameters may differ in their last bit, where
the compiler rounds a product and its sum once in one program and twice in the other.

Tiles are cut along all dimensions but the last two (but the last, of a matrix): stacked layers by layers, stacked
experts by layers and experts. They are slices of the arrays as they lie: what is on the host cannot be
reshaped, a TPU's compiler refuses it.

Compiled ahead of time for v5p, 204 MiB of moments a device: offloaded, arguments take 204 MiB less and temporaries
34 MiB with tiles of 4 MiB. With whole parameters they take 400 MiB, since the compiler fetches them side by side: hence
a config must give a size. Without offloading tiles save nothing there (2.9 MiB, plain 2.3). CPU's loop copies arrays.

Collectives: none (the norm is given). Memory: with `offload` the moments are in the host's, in and out.
Source: Rajbhandari et al. 2021, ZeRO-Infinity (arXiv 2104.07857, section 5.1.1), for optimizer states on the host.
Differs from the paper: the update itself runs on the device, on whole slices of the moments that travel there and back.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from moe import axes


class Tiling(NamedTuple):
    elements: int
    """Largest number of a device's elements in a tile; 0: all of a parameter at once."""
    offload: bool
    """Moments live in the host's memory."""


class Clip(NamedTuple):
    norm: jax.Array
    largest: float

    def __call__(self, grad: jax.Array) -> jax.Array:
        """As `optax.clip_by_global_norm`, operation by operation."""
        return jax.lax.select(self.norm < self.largest, grad, (grad / self.norm.astype(grad.dtype)) * self.largest)


def update(
    each: Any, clip: Clip, grads: Any, state: Any, params: Any, keep: jax.Array, specs: Any, tiling: Tiling
) -> tuple[Any, Any]:
    """(parameters, state) after one update; both as they were where `keep` (a bool scalar) is False.

    `each` is a tree of transformations, one for every parameter, that work element by element; `state` is that of
    their like for the whole tree; `specs` are the parameters' PartitionSpecs (not read without a mesh).
    """
    structure: Any = jax.tree.structure(params)
    is_tree = lambda node: jax.tree.structure(node) == structure  # noqa: E731
    leaves = zip(*(structure.flatten_up_to(tree) for tree in (each, grads, params, specs)), strict=True)
    news = []
    for index, (transformation, grad, value, spec) in enumerate(leaves):
        own = jax.tree.map(
            lambda n, i=index: structure.flatten_up_to(n)[i] if is_tree(n) else n, state, is_leaf=is_tree
        )
        news.append(_parameter(transformation, clip, grad, own, value, keep, spec, tiling))

    def joined(old: Any, *new: Any) -> Any:
        return structure.unflatten(new) if is_tree(old) else new[0]

    states = jax.tree.map(joined, state, *(new for _, new in news), is_leaf=is_tree)
    return structure.unflatten([value for value, _ in news]), states


def _parameter(
    transformation: optax.GradientTransformation, clip: Clip, grad: jax.Array, state: Any, value: jax.Array,
    keep: jax.Array, spec: PartitionSpec, tiling: Tiling,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """One parameter and its state, which holds arrays of the parameter's shape and scalars."""
    run = functools.partial(_local, transformation, tiling)
    arguments = (clip.norm, keep, grad, value, state)
    if not axes.mesh_in_use():
        return run(clip.largest, *arguments)
    whole = PartitionSpec()
    states = jax.tree.map(lambda leaf: spec if _is_moment(leaf, value) else whole, state)
    over: Any = jax.shard_map(
        functools.partial(run, clip.largest),
        in_specs=(whole, whole, spec, spec, states),
        out_specs=(spec, states),
        check_vma=True,
    )
    return over(*arguments)


def _local(
    transformation: optax.GradientTransformation, tiling: Tiling, largest: float, norm: jax.Array, keep: jax.Array,
    grad: jax.Array, value: jax.Array, state: Any,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """One device's slice."""
    clip, tile = Clip(norm, largest), tile_of(value.shape, tiling.elements)
    grid = tuple(size // part for size, part in zip(value.shape, tile, strict=True))
    leaves: list[jax.Array] = jax.tree.leaves(state)
    structure: Any = jax.tree.structure(state)
    is_moment = [_is_moment(leaf, value) for leaf in leaves]
    scalars = [leaf for leaf, moment in zip(leaves, is_moment, strict=True) if not moment]

    def transform(grad: jax.Array, value: jax.Array, moments: list[jax.Array]) -> tuple[jax.Array, list, list]:
        """(new value, new moments, new scalars)"""
        both = {True: iter(moments), False: iter(scalars)}
        before = structure.unflatten([next(both[moment]) for moment in is_moment])
        step, after = transformation.update(clip(grad), before, value)
        new = zip(jax.tree.leaves((after, optax.apply_updates(value, step))), [*is_moment, True], strict=True)
        found: dict[bool, list[jax.Array]] = {True: [], False: []}
        for leaf, moment in new:
            found[moment].append(leaf)
        return found[True].pop(), found[True], found[False]

    def body(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The same tile of the parameter and of its moments."""
        start = [number * size for number, size in zip(jnp.unravel_index(index, grid), tile, strict=True)]
        # Without the barrier slices are fused into what reads them last, behind the write, and whole arrays copied.
        old = list(jax.lax.optimization_barrier([jax.lax.dynamic_slice(x, start, tile) for x in carry]))
        old[1:] = _to("Device", old[1:], tiling)
        moved, moments, _ = transform(jax.lax.dynamic_slice(grad, start, tile), old[0], old[1:])
        new = [jnp.where(keep, a, b) for a, b in zip((moved, *moments), old, strict=True)]
        new[1:] = _to("Host", new[1:], tiling)
        return tuple(jax.lax.dynamic_update_slice(x, part, start) for x, part in zip(carry, new, strict=True))

    moments = [leaf for leaf, moment in zip(leaves, is_moment, strict=True) if moment]
    carry = (value, *_to("Host", moments, tiling))
    carry = jax.lax.fori_loop(0, math.prod(grid), body, carry) if max(grid) > 1 else body(jnp.int32(0), carry)
    # What is not a moment changes alike for every tile; of this one the rest is never computed.
    none = jnp.zeros(tile, value.dtype)
    counted = iter(transform(none, none, [none] * len(moments))[2])
    kept = iter(jnp.where(keep, next(counted), leaf) for leaf in scalars)
    back = iter(carry[1:])
    return carry[0], structure.unflatten([next(back) if moment else next(kept) for moment in is_moment])


def tile_of(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """Shape of the largest tile of at most so many elements, 0: any number; its sizes divide those of `shape`.

    The first dimensions are cut first and the last two never (of a matrix the last), so a tile may be larger.
    """
    tile = list(shape)
    for dimension in range(max(1, len(shape) - 2)) if elements else ():
        rest = math.prod(tile[dimension + 1 :])
        fit = [n for n in range(1, shape[dimension] + 1) if shape[dimension] % n == 0 and n * rest <= elements]
        tile[dimension] = max(fit, default=1)
    return tuple(tile)


def _to(space: str, moments: list[jax.Array], tiling: Tiling) -> list[jax.Array]:
    if not tiling.offload:
        return moments
    return [jax.device_put(leaf, getattr(jax.memory.Space, space)) for leaf in moments]


def _is_moment(leaf: Any, value: jax.Array) -> bool:
    return leaf.shape == value.shape
