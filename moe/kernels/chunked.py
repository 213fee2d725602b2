"""Causal attention inside documents, chunk by chunk: no array is as large as S x S, forward or backward.

    o_q = sum_k softmax_k(scale q k) v_k      over the keys k <= q of the query's segment

Positions are cut into chunks of c. What is computed is a list of pairs (chunk of queries, chunk of keys), one after the
other in one loop, so the program does not grow with S, and pairs that the causal mask empties are not in the list:
X chunks cost X (X + 1) / 2 products of c x c. Each pair adds to a query's float32 running maximum, sum and weighted
values (online softmax); at the end o = weighted values / sum, and log_z = maximum + log(sum) is all that is kept for
the backward pass beside inputs and output, which makes the scores again, with P = exp(score - log_z):

    dV = P^T dO;   dS = P * (dO V^T - (dO . o));   dQ = scale dS K;   dK = scale dS^T Q

A pair is four numbers: the queries' and the keys' place among the chunks at hand, and their chunk in the sequence,
which says what the mask lets through. So a device may hold any chunks in any order: `moe.kernels.ring`.
Source: Rabe & Staats 2021 (arXiv 2112.05682); Dao et al. 2022 (arXiv 2205.14135), algorithms 1 and 4 (there with the
queries in the inner loop). Differs from the papers: the list of pairs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

ATTENTION_NAME = "attention"
"""Checkpoint name of queries, keys, values, mixed values and what else the backward pass of attention reads."""

HIDDEN = -1e30
"""Score of a key that the query must not see; finite, so that no difference of two is NaN."""


class Sums(NamedTuple):
    """Running sums of C chunks of queries, float32."""

    value_CBMGcV: jax.Array
    """sum of exp(score - maximum) times value."""
    max_CBMGc: jax.Array
    sum_CBMGc: jax.Array


class Gradients(NamedTuple):
    """Sums of the gradients of queries, keys and values, float32, in their chunked shapes."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def cut(x_BSN: jax.Array, groups: int, chunk: int) -> jax.Array:
    """[B, S, N, H] -> [S/c, B, N/groups, groups, c, H]."""
    B, S, N, H = x_BSN.shape
    return x_BSN.reshape(B, S // chunk, chunk, N // groups, groups, H).transpose(1, 0, 3, 4, 2, 5)


def joined(x_CBMGcH: jax.Array) -> jax.Array:
    """The inverse of `cut`."""
    C, B, M, G, c, H = x_CBMGcH.shape
    return x_CBMGcH.transpose(1, 0, 4, 2, 3, 5).reshape(B, C * c, M * G, H)


def causal_pairs(num_chunks: int) -> np.ndarray:
    """int32 [P, 4] of a whole sequence: every chunk of queries with all chunks of keys up to its own."""
    return np.array([(q, k, q, k) for q in range(num_chunks) for k in range(q + 1)], np.int32)


def empty_sums(query_CBMGcH: jax.Array, value_width: int) -> Sums:
    shape = query_CBMGcH.shape[:-1]
    parts = jnp.zeros((*shape, value_width)), jnp.full(shape, HIDDEN), jnp.zeros(shape)
    return Sums(*(varying_as(query_CBMGcH, part) for part in parts))


def add_pairs(
    sums: Sums, query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array, pairs: Any, scale: float
) -> Sums:
    """`sums` after these pairs.

    query [C, B, M, G, c, H], key [X, B, M, 1, c, H], value [X, B, M, 1, c, V], segment [chunks of S, B, c].
    """

    def body(sums: Sums, pair: jax.Array) -> tuple[Sums, None]:
        score = _scores(query, key, segment, pair, scale)
        before = Sums(*(_at(part, pair[0]) for part in sums))
        maximum = jnp.maximum(before.max_CBMGc, score.max(axis=-1))
        share = jnp.exp(score - maximum[..., None])
        fade = jnp.exp(before.max_CBMGc - maximum)
        one = _at(value, pair[1])[:, :, 0]
        mixed = jnp.einsum("bmgqk,bmkv->bmgqv", share.astype(one.dtype), one, preferred_element_type=jnp.float32)
        after = Sums(before.value_CBMGcV * fade[..., None] + mixed, maximum, before.sum_CBMGc * fade + share.sum(-1))
        return Sums(*(_put(whole, part, pair[0]) for whole, part in zip(sums, after, strict=True))), None

    return jax.lax.scan(body, sums, jnp.asarray(pairs))[0]


def outputs(sums: Sums, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(o [C, B, M, G, c, V], log_z float32 [C, B, M, G, c])."""
    mixed = (sums.value_CBMGcV / sums.sum_CBMGc[..., None]).astype(dtype)
    log_z = sums.max_CBMGc + jnp.log(sums.sum_CBMGc)
    return checkpoint_name(mixed, ATTENTION_NAME), checkpoint_name(log_z, ATTENTION_NAME)


class Backward(NamedTuple):
    """Of the queries at hand, what the backward pass reads."""

    query: jax.Array
    d_output: jax.Array
    log_z: jax.Array
    agreement: jax.Array
    """float32 [C, B, M, G, c]: dO . o, which the softmax takes off every score's gradient."""

    @classmethod
    def of(cls, query: jax.Array, output: jax.Array, log_z: jax.Array, d_output: jax.Array) -> "Backward":
        agreement = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(axis=-1)
        return cls(query, d_output, log_z, agreement)


def add_gradients(
    sums: Gradients, given: Backward, key: jax.Array, value: jax.Array, segment: jax.Array, pairs: Any, scale: float
) -> Gradients:
    """`sums` after the gradients of these pairs; shapes as in `add_pairs`."""

    def body(sums: Gradients, pair: jax.Array) -> tuple[Gradients, None]:
        score = _scores(given.query, key, segment, pair, scale)
        query, d_output, log_z, agreement = (_at(part, pair[0]) for part in given)
        one_key, one_value = _at(key, pair[1])[:, :, 0], _at(value, pair[1])[:, :, 0]
        share = jnp.exp(score - log_z[..., None])
        d_share = _product("bmgqv,bmkv->bmgqk", d_output, one_value)
        d_score = (share * (d_share - agreement[..., None]) * scale).astype(query.dtype)
        d_key = _product("bmgqk,bmgqh->bmkh", d_score, query)
        d_value = _product("bmgqk,bmgqv->bmkv", share.astype(d_output.dtype), d_output)
        found = (_product("bmgqk,bmkh->bmgqh", d_score, one_key), d_key[:, :, None], d_value[:, :, None])
        places = (pair[0], pair[1], pair[1])
        return Gradients(*(_put(s, _at(s, at) + new, at) for s, new, at in zip(sums, found, places, strict=True))), None

    return jax.lax.scan(body, sums, jnp.asarray(pairs))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_pairs(
    query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array, pairs: Any, scale: float
) -> jax.Array:
    """o [C, B, M, G, c, V] in the dtype of the queries, for a list of pairs that holds every query's own chunk.

    Shapes as in `add_pairs`. Gradient: query, key and value. Collectives: none.
    """
    return _forward(query, key, value, segment, pairs, scale)[0]


def _forward(query: Any, key: Any, value: Any, segment: Any, pairs: Any, scale: float) -> tuple[jax.Array, Any]:
    sums = add_pairs(empty_sums(query, value.shape[-1]), query, key, value, segment, pairs, scale)
    output, log_z = outputs(sums, query.dtype)
    return output, (query, key, value, segment, pairs, output, log_z)


def _backward(scale: float, kept: Any, d_output: jax.Array) -> tuple[Any, ...]:
    query, key, value, segment, pairs, output, log_z = kept
    given = Backward.of(query, output, log_z, d_output)
    sums = add_gradients(empty_gradients(query, key, value), given, key, value, segment, pairs, scale)
    found = (part.astype(of.dtype) for part, of in zip(sums, (query, key, value), strict=True))
    return (*found, None, None)


attend_pairs.defvjp(_forward, _backward)


def empty_gradients(query: jax.Array, key: jax.Array, value: jax.Array) -> Gradients:
    return Gradients(*(varying_as(part, jnp.zeros(part.shape)) for part in (query, key, value)))


def varying_as(like: jax.Array, x: jax.Array) -> jax.Array:
    """x, which inside a `shard_map` counts as different on every device where `like` is."""
    missing = tuple(jax.typeof(like).mat.varying - jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _scores(query: jax.Array, key: jax.Array, segment: jax.Array, pair: jax.Array, scale: float) -> jax.Array:
    """float32 [B, M, G, c, c], `HIDDEN` where the key comes later than the query or is of another segment."""
    score = _product("bmgqh,bmkh->bmgqk", _at(query, pair[0]), _at(key, pair[1])[:, :, 0]) * scale
    place = jnp.arange(segment.shape[-1])
    causal_cc = (pair[2] - pair[3]) * len(place) + place[:, None] >= place
    same_Bcc = _at(segment, pair[2])[:, :, None] == _at(segment, pair[3])[:, None, :]
    return jnp.where((causal_cc & same_Bcc)[:, None, None], score, HIDDEN)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _at(chunks: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(chunks, index, keepdims=False)


def _put(chunks: jax.Array, one: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(chunks, one, index, 0)
