"""Causal attention inside documents: how scores are held, and what moves where positions are cut over the mesh.

    o_s = sum_t softmax_t(scale q_s k_t) v_t      over t <= s with segment_t = segment_s

Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; those of `moe.kernels.chunked` and `moe.kernels.ring`.
Differs from the papers: masked by segment.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.axes import CONTEXT, constrain, mesh_in_use, per_device, size, spec
from moe.config import ConfigError, at_least
from moe.kernels import ring
from moe.kernels.chunked import ATTENTION_NAME, attend_pairs, causal_pairs, cut, joined

QUERY, KEY_VALUE = ("batch", "position", "heads", None), ("batch", "position", "kv_heads", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendConfig:
    """How attention is computed; a matter of memory and speed alone."""

    method: Literal["whole", "gather", "ring"] = "whole"
    """whole: all scores of S x S at once. gather, ring: chunk by chunk, without those that the causal mask hides; where
    mesh.context cuts positions, keys and values are gathered on every device, or travel around the devices."""
    chunk: int = 512
    """Positions of a chunk of gather and ring; a shorter piece of a sequence is one chunk."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, chunk=1)
        default = type(self).chunk
        if self.method == "whole" and self.chunk != default:
            yield "chunk", f"is ignored, as method='whole' has no chunks; leave it at {default}"

    def length_problems(self, seq_len: int, context: int) -> Iterator[tuple[str, str]]:
        """Problems that show only once the length of sequences and their cut are known."""
        if self.method == "whole":
            return
        pieces = 2 * context if context > 1 else 1
        if seq_len % pieces:
            yield (
                "method",
                f"cuts a sequence into 2 pieces for each of mesh.context = {context}, so its length {seq_len} must be"
                f" divisible by {pieces}",
            )
        elif (piece := seq_len // pieces) % min(self.chunk, piece):
            yield "chunk", f"must divide the {piece} positions of a piece: one of {pieces} of a sequence of {seq_len}"


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_BS: jax.Array, config: AttendConfig, scale: float
) -> jax.Array:
    """query [B, S, N, H], key [B, S, M, H], value [B, S, M, V], segment int32 [B, S] -> [B, S, N, V].

    Query head n reads key-value head n M // N. Softmax and sums in float32, products in the dtype of the queries, which
    is that of the result. Gradient: query, key, value.

    Raises ConfigError if the method cannot cut S. Collectives: none without a mesh or with context = 1; else "whole"
    all-gathers keys and values over context (the transpose sums their gradients), and see `moe.kernels.ring`.
    """
    if config.method == "whole":
        return _whole(query, key, value, segment_BS, scale)
    mesh = jax.sharding.get_abstract_mesh()
    context = size(mesh, CONTEXT) if mesh_in_use() else 1
    for field, limit in config.length_problems(query.shape[1], context):
        raise ConfigError(f"attend.{field} = {getattr(config, field)!r}: {limit}")
    chunk = min(config.chunk, query.shape[1] // (2 * context if context > 1 else 1))
    if context == 1:
        method: Any = _on_one
    else:
        method = ring.gathered if config.method == "gather" else ring.ring
    method = functools.partial(method, chunk=chunk, scale=scale)
    if not mesh_in_use():
        return method(query, key, value, segment_BS)
    specs = (spec(QUERY), spec(KEY_VALUE), spec(KEY_VALUE), spec(("batch",)))
    return per_device(method, specs, spec(QUERY))(query, key, value, segment_BS)


def _on_one(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_BS: jax.Array, *, chunk: int, scale: float
) -> jax.Array:
    groups, pairs = query.shape[2] // key.shape[2], jnp.asarray(causal_pairs(query.shape[1] // chunk))
    query, key, value = cut(query, groups, chunk), cut(key, 1, chunk), cut(value, 1, chunk)
    return joined(attend_pairs(query, key, value, ring.chunks(segment_BS, chunk), pairs, scale))


def _whole(query: jax.Array, key: jax.Array, value: jax.Array, segment_BS: jax.Array, scale: float) -> jax.Array:
    S = query.shape[1]
    mask_B1SS = (jnp.tril(jnp.ones((S, S), bool)) & (segment_BS[:, :, None] == segment_BS[:, None, :]))[:, None]
    mask_B1SS = constrain(mask_B1SS, "batch", None, "position", None)
    key, value = (constrain(x, "batch", None, "kv_heads", None) for x in (key, value))
    mixed = constrain(attend_masked(query, key, value, mask_B1SS, scale), *QUERY)
    return checkpoint_name(mixed, ATTENTION_NAME)


def attend_masked(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """All scores at once under a mask that broadcasts to [B, N, S, X]; shapes as in `attend`, with X keys."""
    if query.shape[-1] == value.shape[-1]:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="xla")
    B, S, N, H = query.shape
    grouped = query.reshape(B, S, key.shape[2], -1, H)
    score = jnp.einsum("bsmgh,bxmh->bmgsx", grouped, key, preferred_element_type=jnp.float32) * scale
    mask = jnp.broadcast_to(mask, (mask.shape[0], N, *mask.shape[2:])).reshape(-1, *score.shape[1:3], *mask.shape[2:])
    share = jax.nn.softmax(jnp.where(mask, score, jnp.finfo(jnp.float32).min)).astype(value.dtype)
    return jnp.einsum("bmgsx,bxmv->bsmgv", share, value).reshape(B, S, N, -1)
