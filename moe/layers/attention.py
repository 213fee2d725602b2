"""Causal grouped-query attention with rotary positions, masked by segment: a token sees its own document only.

    q, k, v = x W_query, x W_key, x W_value       per head; with `head_norm` RMSNorm over H, one gain for all heads
    y = sum_n softmax(rope(q_n) rope(k_m)^T / sqrt(H)) v_m W_out_n

Softmax in float32. A padding token (segment 0) attends to earlier padding and itself, so no row of the mask is empty.
Source: Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries; Su et al. 2021 (arXiv 2104.09864), eq. 34; Zhuo et
al. 2025 (arXiv 2503.04598) for head norms, as in https://github.com/BryceZhuo/HybridNorm.
Differs from the paper: rotary pairs dimension i with i + H/2, as Llama checkpoints do.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe import param
from moe.axes import constrain
from moe.config import at_least
from moe.layers.base import Sublayer, SublayerConfig
from moe.layers.norm import RMSNorm
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(SublayerConfig):
    """Grouped-query attention."""

    label: ClassVar[str] = "attention"
    mixes_tokens: ClassVar[bool] = True
    output_scale: ClassVar[float] = 0.283

    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int = 4
    """M, key-value heads; N must be divisible by it."""
    head_width: int = 32
    """H, width of a head; even, because rotary positions rotate pairs."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    head_norm: Literal["none", "qk", "qkv"] = "none"
    """Which of queries, keys and values are normalised per head, before rotation."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_heads=1, num_kv_heads=1, head_width=2)
        if self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"must divide num_heads = {self.num_heads}"
        if self.head_width % 2:
            yield "head_width", "must be even"
        if not self.rope_theta > 0:
            yield "rope_theta", "must be greater than 0"

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "Attention":
        return Attention(self, key, width, init_std, out_std)

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        yield "num_heads", self.num_heads, "tensor"
        yield "num_kv_heads", self.num_kv_heads, "tensor"

    def multiply_adds(self, width: int, seq_len: int) -> float:
        heads = self.num_heads * self.head_width
        # Scores and mixing together: N H S, of which a causal mask leaves half of 2 N H S.
        return 2 * width * heads + 2 * width * self.num_kv_heads * self.head_width + heads * seq_len


class Cache(NamedTuple):
    """Keys and values of the positions so far, for decoding one token at a time."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array
    """int32 positions filled."""


class Attention(Sublayer):
    """x [B, S, D] -> [B, S, D] in the dtype of x."""

    def __init__(self, config: AttentionConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        self.config = config
        N, M, H = config.num_heads, config.num_kv_heads, config.head_width
        keys = jax.random.split(key, 4)
        self.w_query = param.normal(keys[0], (width, N, H), ("embed", "heads", "head_width"), init_std)
        self.w_key = param.normal(keys[1], (width, M, H), ("embed", "kv_heads", "head_width"), init_std)
        self.w_value = param.normal(keys[2], (width, M, H), ("embed", "kv_heads", "head_width"), init_std)
        self.w_out = param.normal(keys[3], (N, H, width), ("heads", "head_width", "embed"), out_std)
        self.query_norm = RMSNorm(H) if config.head_norm != "none" else None
        self.key_norm = RMSNorm(H) if config.head_norm != "none" else None
        self.value_norm = RMSNorm(H) if config.head_norm == "qkv" else None

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, None]:
        query, key, value = self._project(x_BSD, context.position_BS)
        S, segment_BS = x_BSD.shape[1], context.segment_BS
        causal_SS = jnp.tril(jnp.ones((S, S), bool))
        mask_B1SS = (causal_SS & (segment_BS[:, :, None] == segment_BS[:, None, :]))[:, None]
        return self._attend(query, key, value, mask_B1SS), None

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        zeros = jnp.zeros((batch, length, self.config.num_kv_heads, self.config.head_width), dtype)
        return Cache(zeros, zeros, jnp.int32(0))

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The same for S new positions of one document that follow the `cache.length` cached ones."""
        query, key, value = self._project(x_BSD, context.position_BS)
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
        query, key, value = (
            part if norm is None else norm(part)
            for part, norm in ((query, self.query_norm), (key, self.key_norm), (value, self.value_norm))
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
