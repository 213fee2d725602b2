"""Attention over positions that are cut over the mesh's context axes, with the same work on every device.

Between layers device i of n holds positions [i, i+1) S/n. A causal mask would give the last device n times the work of
the first. So inside attention the sequence is 2n pieces and device i holds pieces i and 2n-1-i ("zigzag"): halves of
what it holds travel there before and back after, straight from device to device, and no other layer knows.

    gather: queries in zigzag; keys and values of the whole sequence are gathered on every device
    ring:   queries, keys and values in zigzag; in n - 1 steps keys and values travel once around. Device i meets those
            of device j: j < i: both its pieces see piece j, none sees 2n-1-j; j > i: only its later one sees, both

Either way a device computes the same number of chunk pairs, and no others: (2n + 1) of piece x piece, where n (2n + 1)
are causal. In the backward pass of `ring` the float32 gradients of keys and values travel with them, n steps.

Elements that one device sends and receives, of a layer's forward pass, with s = S/n its positions and N, M the heads
it holds: zigzag at most 2 s N H (queries, outputs) and in `ring` 2 s M H more (keys, values), at least 1/n of which
stay at home; keys and values (n - 1) 2 s M H either way. Memory of keys and values: gather S, ring 2 s in flight.
Source: Liu et al. 2023 (arXiv 2310.01889) for the ring; Brandon et al. 2023 (arXiv 2311.09431) for its causal balance;
Grattafiori et al. 2024, Llama 3 (arXiv 2407.21783, section 3.3.2) for gathered keys with 2n pieces.
Differs from the papers: the exchange is inside attention, where they permute the batch; Brandon et al. deal tokens out
in stripes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.axes import CONTEXT
from moe.kernels.chunked import (
    Backward,
    Gradients,
    add_gradients,
    add_pairs,
    attend_pairs,
    cut,
    empty_gradients,
    empty_sums,
    joined,
    outputs,
)


def gathered(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array, chunk: int, scale: float) -> Any:
    """One device's part of attention, `gather`: query [B, s, N, H], key and value [B, s, M, ...] -> [B, s, N, V].

    segment [B, S] is that of the whole sequence. Gradient: query, key, value. Collectives: two collective-permutes of
    half the queries, two of half the outputs, an all-gather each of keys and values, all over context.
    """
    n, groups = jax.lax.axis_size(CONTEXT), query.shape[2] // key.shape[2]
    per_piece = query.shape[1] // 2 // chunk
    query = cut(to_zigzag(query), groups, chunk)
    key, value = (cut(jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True), 1, chunk) for x in (key, value))
    pairs = jnp.asarray(gather_pairs(n, per_piece))[jax.lax.axis_index(CONTEXT)]
    return from_zigzag(joined(attend_pairs(query, key, value, chunks(segment, chunk), pairs, scale)))


def ring(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array, chunk: int, scale: float) -> Any:
    """One device's part of attention, `ring`, for context > 1; shapes and gradient as in `gathered`.

    Collectives over context: collective-permutes of halves of queries, keys, values and outputs, and n - 1 of all keys
    and values; backward the same, and n of their float32 gradients.
    """
    groups = query.shape[2] // key.shape[2]
    query, key, value = (cut(to_zigzag(x), g, chunk) for x, g in ((query, groups), (key, 1), (value, 1)))
    return from_zigzag(joined(_ring(query, key, value, chunks(segment, chunk), scale)))


def gather_pairs(n: int, per_piece: int) -> np.ndarray:
    """int32 [n, P, 4]: of each device the pairs of `moe.kernels.chunked`, with keys in the order of the sequence."""
    rows = []
    for device in range(n):
        chunks = [piece * per_piece + a for piece in (device, 2 * n - 1 - device) for a in range(per_piece)]
        rows.append([(place, k, q, k) for place, q in enumerate(chunks) for k in range(q + 1)])
    return np.array(rows, np.int32)


def ring_pairs(device: Any, step: Any, n: int, per_piece: int) -> jax.Array:
    """int32 [P, 4]: the pairs of a device in a step of the ring, where it meets the keys of device - step."""
    chunks = 2 * per_piece
    if isinstance(step, int) and step == 0:
        places = jnp.array([(q, k) for q in range(chunks) for k in range(q + 1)], jnp.int32)
    else:
        block = np.indices((per_piece, per_piece), dtype=np.int32).reshape(2, -1).T
        late_to_early = block + np.array([per_piece, 0], np.int32)
        # Of an earlier device both pieces of queries see the early piece; of a later one the late piece sees both.
        other = jnp.where(step <= device, block, block + per_piece)
        places = jnp.concatenate([jnp.asarray(late_to_early), other])
    source = (device - step) % n
    query = _chunk_of(places[:, 0], device, n, per_piece)
    key = _chunk_of(places[:, 1], source, n, per_piece)
    return jnp.stack([places[:, 0], places[:, 1], query, key], axis=1)


def _chunk_of(place: Any, device: Any, n: int, per_piece: int) -> jax.Array:
    """The chunk in the sequence that lies at a place of a device's zigzag."""
    piece = jnp.where(place < per_piece, device, 2 * n - 1 - device)
    return (piece * per_piece + place % per_piece).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array, scale: float) -> jax.Array:
    return _ring_forward(query, key, value, segment, scale)[0]


def _ring_forward(query: Any, key: Any, value: Any, segment: Any, scale: float) -> tuple[jax.Array, Any]:
    def meet(sums: Any, key_value: Any, pairs: Any, own: bool) -> Any:
        return add_pairs(sums, query, key_value[0], key_value[1], segment, pairs, scale)

    sums = _around(empty_sums(query, value.shape[-1]), (key, value), meet, query.shape[0])
    output, log_z = outputs(sums, query.dtype)
    return output, (query, key, value, segment, output, log_z)


def _ring_backward(scale: float, kept: Any, d_output: jax.Array) -> tuple[Any, ...]:
    query, key, value, segment, output, log_z = kept
    given = Backward.of(query, output, log_z, d_output)
    nothing = empty_gradients(query, key, value)

    def meet(sums: Gradients, key_value: Any, pairs: Any, own: bool) -> Gradients:
        start = Gradients(sums.query, nothing.key, nothing.value)
        fresh = add_gradients(start, given, key_value[0], key_value[1], segment, pairs, scale)
        if own:
            return fresh
        # What arrives belongs to the keys met here: both have moved on by one device since the last step.
        arrived_key, arrived_value = _pass_on((sums.key, sums.value))
        return Gradients(fresh.query, arrived_key + fresh.key, arrived_value + fresh.value)

    sums = _around(nothing, (key, value), meet, query.shape[0])
    found = Gradients(sums.query, *_pass_on((sums.key, sums.value)))
    return (*(part.astype(of.dtype) for part, of in zip(found, (query, key, value), strict=True)), None)


_ring.defvjp(_ring_forward, _ring_backward)


def _around(sums: Any, key_value: Any, meet: Callable[[Any, Any, Any, bool], Any], num_chunks: int) -> Any:
    """`meet` once with the keys and values of every device, one's own first; the next ones travel meanwhile."""
    n, device = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT)
    pairs = functools.partial(ring_pairs, n=n, per_piece=num_chunks // 2)

    def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
        sums, here = carry
        following = _pass_on(here)
        return (meet(sums, here, pairs(device, step), False), following), None

    following = _pass_on(key_value)
    sums = meet(sums, key_value, pairs(device, 0), True)
    if n > 2:
        (sums, following), _ = jax.lax.scan(body, (sums, following), jnp.arange(1, n - 1))
    return meet(sums, following, pairs(device, jnp.int32(n - 1)), False)


def _pass_on(parts: Any) -> Any:
    n = jax.lax.axis_size(CONTEXT)
    to_next = [(device, (device + 1) % n) for device in range(n)]
    return jax.tree.map(lambda part: jax.lax.ppermute(part, CONTEXT, to_next), parts)


def to_zigzag(x: jax.Array) -> jax.Array:
    """Positions (dimension 1) i of n -> pieces i and 2n-1-i of 2n. Collectives: two collective-permutes of a half."""
    n = jax.lax.axis_size(CONTEXT)
    even, odd = (
        jax.lax.ppermute(half, CONTEXT, routes) for half, routes in zip(_halves(x), zigzag_routes(n), strict=True)
    )
    return jnp.concatenate(_by_parity(even, odd), axis=1)


def from_zigzag(x: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""
    n = jax.lax.axis_size(CONTEXT)
    back = [[(to, source) for source, to in routes] for routes in zigzag_routes(n)]
    halves = (
        jax.lax.ppermute(half, CONTEXT, routes) for half, routes in zip(_by_parity(*_halves(x)), back, strict=True)
    )
    return jnp.concatenate(list(halves), axis=1)


def zigzag_routes(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of every device's first half, the even pieces, and of its second half: each is a permutation."""
    home = [min(piece, 2 * n - 1 - piece) for piece in range(2 * n)]
    return [(i, home[2 * i]) for i in range(n)], [(i, home[2 * i + 1]) for i in range(n)]


def _by_parity(even: jax.Array, odd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(early, late) from (even, odd) piece, and back: device i has the early piece i, so they swap where i is odd."""
    swap = jax.lax.axis_index(CONTEXT) % 2 == 1
    return jnp.where(swap, odd, even), jnp.where(swap, even, odd)


def _halves(x: jax.Array) -> list[jax.Array]:
    return jnp.split(x, 2, axis=1)


def chunks(segment_BS: jax.Array, chunk: int) -> jax.Array:
    """[B, S] -> [S/c, B, c]."""
    B, S = segment_BS.shape
    return segment_BS.reshape(B, S // chunk, chunk).swapaxes(0, 1)
