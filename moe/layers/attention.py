"""Causal grouped-query attention with rotary positions, masked by segment: a token sees its own document only.

Softmax in float32. A padding token (segment 0) attends to earlier padding and itself, so no row of the mask is empty.
Source: Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries; Su et al. 2021 (arXiv 2104.09864), eq. 34.
Differs from the paper: rotary pairs dimension i with i + H/2, as Llama checkpoints do.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param
from moe.axes import constrain
from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention."""

    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int = 4
    """M, key-value heads; N must be divisible by it."""
    head_width: int = 32
    """H, width of a head; even, because rotary positions rotate pairs."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_heads=1, num_kv_heads=1, head_width=2)
        if self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"must divide num_heads = {self.num_heads}"
        if self.head_width % 2:
            yield "head_width", "must be even"
        if not self.rope_theta > 0:
            yield "rope_theta", "must be greater than 0"


class Cache(NamedTuple):
    """Keys and values of the positions so far, for decoding one token at a time."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array
    """int32 positions filled."""


class Attention(nnx.Module):
    """x [B, S, D] -> [B, S, D] in the dtype of x."""

    def __init__(self, config: AttentionConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        self.config = config
        N, M, H = config.num_heads, config.num_kv_heads, config.head_width
        keys = jax.random.split(key, 4)
        self.w_query = param.normal(keys[0], (width, N, H), ("embed", "heads", "head_width"), init_std)
        self.w_key = param.normal(keys[1], (width, M, H), ("embed", "kv_heads", "head_width"), init_std)
        self.w_value = param.normal(keys[2], (width, M, H), ("embed", "kv_heads", "head_width"), init_std)
        self.w_out = param.normal(keys[3], (N, H, width), ("heads", "head_width", "embed"), out_std)

    def __call__(self, x_BSD: jax.Array, position_BS: jax.Array, segment_BS: jax.Array) -> jax.Array:
        query, key, value = self._project(x_BSD, position_BS)
        S = x_BSD.shape[1]
        causal_SS = jnp.tril(jnp.ones((S, S), bool))
        mask_B1SS = (causal_SS & (segment_BS[:, :, None] == segment_BS[:, None, :]))[:, None]
        return self._attend(query, key, value, mask_B1SS)

    def decode(self, x_BSD: jax.Array, position_BS: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The same for S new positions of one document that follow the `cache.length` cached ones."""
        query, key, value = self._project(x_BSD, position_BS)
        start = (0, cache.length, 0, 0)
        cache = Cache(
            jax.lax.dynamic_update_slice(cache.key_BSMH, key.astype(cache.key_BSMH.dtype), start),
            jax.lax.dynamic_update_slice(cache.value_BSMH, value.astype(cache.value_BSMH.dtype), start),
            cache.length + x_BSD.shape[1],
        )
        at_most_S1 = (cache.length - x_BSD.shape[1] + jnp.arange(x_BSD.shape[1]))[:, None]
        mask_11SX = (jnp.arange(cache.key_BSMH.shape[1]) <= at_most_S1)[None, None]
        return self._attend(query, cache.key_BSMH, cache.value_BSMH, mask_11SX), cache

    def _project(self, x_BSD: jax.Array, position_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = (
            constrain(jnp.einsum("bsd,dnh->bsnh", x_BSD, w[...].astype(x_BSD.dtype)), "batch", "position", heads, None)
            for w, heads in ((self.w_query, "heads"), (self.w_key, "kv_heads"), (self.w_value, "kv_heads"))
        )
        theta = self.config.rope_theta
        return rotate(query, position_BS, theta), rotate(key, position_BS, theta), value

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
        return jnp.einsum("bsnh,nhd->bsd", mixed, self.w_out[...].astype(mixed.dtype))


def rotate(x_BSNH: jax.Array, position_BS: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding; angles in float32, result in the dtype of x."""
    half = x_BSNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BS[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)
