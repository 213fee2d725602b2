"""Causal grouped-query attention with rotary positions, masked by segment: a token sees its own document only.

    q, k, v = x W_query, x W_key, x W_value       per head; plus b with `qkv_bias`, which starts at 0
    q, k, v <- RMSNorm(q), RMSNorm(k), RMSNorm(v) as `head_norm` says: over H with one gain for all heads, or with
                                                  qk_whole over all N H (M H) dimensions with a gain for each
    y = sum_n softmax(rope(q_n) rope(k_m)^T / sqrt(H)) v_m W_out_n

Rotary positions, and the factor on scores that comes with YaRN: `moe.layers.rope`.

Softmax in float32. A padding token (segment 0) attends to earlier padding and itself, so no row of the mask is empty.
Source: Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries; Zhuo et al. 2025 (arXiv 2503.04598) for head norms,
as in https://github.com/BryceZhuo/HybridNorm; Muennighoff et al. 2024, OLMoE (arXiv 2409.02060) for qk_whole.
Differs from the papers: no difference known.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.axes import constrain
from moe.config import at_least
from moe.kernels.attend import AttendConfig, attend, attend_masked
from moe.kernels.chunked import ATTENTION_NAME
from moe.kernels.project import project
from moe.layers.base import Sublayer, SublayerConfig
from moe.layers.norm import RMSNorm
from moe.layers.rope import RopeConfig, rotate
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
    rope: RopeConfig = RopeConfig()
    head_norm: Literal["none", "qk", "qkv", "qk_whole"] = "none"
    """Which of queries, keys and values are normalised, before rotation: each head by itself, or (qk_whole, OLMoE) all
    heads as one vector."""
    norm_eps: float = 1e-6
    """Epsilon of these norms."""
    qkv_bias: bool = False
    """Add a learned bias to queries, keys and values (Qwen2)."""
    attend: AttendConfig = AttendConfig()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_heads=1, num_kv_heads=1, head_width=2)
        if self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"must divide num_heads = {self.num_heads}"
        if self.head_width % 2:
            yield "head_width", "must be even"
        for limit in self.rope.theta_problems(self.rope_theta):
            yield "rope_theta", limit
        for field, limit in self.rope.head_problems(self.head_width):
            yield f"rope.{field}", limit
        if not self.norm_eps > 0:
            yield "norm_eps", "must be greater than 0"
        if self.head_norm == "none" and self.norm_eps != 1e-6:
            yield "norm_eps", "is ignored, as no head is normalised; leave it at 1e-6"

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
        # Vectors, cut like the heads they belong to: weight decay leaves vectors alone.
        zeros = lambda heads, axis: param.declare(jnp.zeros((heads * H,), jnp.float32), (axis,))  # noqa: E731
        self.b_query = zeros(N, "heads") if config.qkv_bias else None
        self.b_key = zeros(M, "kv_heads") if config.qkv_bias else None
        self.b_value = zeros(M, "kv_heads") if config.qkv_bias else None
        norm, whole = config.head_norm, config.head_norm == "qk_whole"
        self.query_norm = RMSNorm(N * H if whole else H, config.norm_eps) if norm != "none" else None
        self.key_norm = RMSNorm(M * H if whole else H, config.norm_eps) if norm != "none" else None
        self.value_norm = RMSNorm(H, config.norm_eps) if norm == "qkv" else None

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, None]:
        query, key, value = self._project(x_BSD, context.position_BS)
        mixed = attend(query, key, value, context.segment_BS, self.config.attend, self._scale)
        return self._write(mixed), None

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
        mixed = attend_masked(query, cache.key_BSMH, cache.value_BSMH, mask_11SX, self._scale)
        return self._write(mixed), cache

    def _project(self, x_BSD: jax.Array, position_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        parts = (
            (self.w_query, self.b_query, self.query_norm, "heads"),
            (self.w_key, self.b_key, self.key_norm, "kv_heads"),
            (self.w_value, self.b_value, self.value_norm, "kv_heads"),
        )
        query, key, value = (self._heads(x_BSD, *part) for part in parts)
        turn = lambda x: rotate(x, position_BS, self.config.rope_theta, self.config.rope)  # noqa: E731
        query, key, value = (checkpoint_name(part, ATTENTION_NAME) for part in (turn(query), turn(key), value))
        return query, key, value

    def _heads(
        self, x_BSD: jax.Array, weight: nnx.Param, bias: nnx.Param | None, norm: RMSNorm | None, heads: str
    ) -> jax.Array:
        """Queries, keys or values [B, S, heads, H] before rotation."""
        whole = ("batch", "position", None)
        y_BSNH = project("bsd,dnh->bsnh", x_BSD, weight[...], (None, heads, None), whole)
        y_BSNH = constrain(y_BSNH, "batch", "position", heads, None)
        if bias is not None:
            y_BSNH = y_BSNH + bias[...].reshape(y_BSNH.shape[2:]).astype(y_BSNH.dtype)
        if norm is None:
            return y_BSNH
        if self.config.head_norm == "qk_whole":
            return norm(y_BSNH.reshape(*y_BSNH.shape[:2], -1)).reshape(y_BSNH.shape)
        return norm(y_BSNH)

    @property
    def _scale(self) -> float:
        return self.config.rope.score_scale / math.sqrt(self.config.head_width)

    def _write(self, mixed_BSNH: jax.Array) -> jax.Array:
        y_BSD = project("bsnh,nhd->bsd", mixed_BSNH, self.w_out[...], ("heads", None, None))
        return constrain(y_BSD, "batch", "stream", None)
