"""Multi-head latent attention: keys and values of all heads come from one small vector a token, and so does the cache.

    c_q = RMSNorm(x W_query_down) [Q];   q = c_q W_query_up, per head H dimensions without position and R with
    c, k_r = x W_key_value_down [C + R]; c <- RMSNorm(c);   k, v = c W_key_up [H], c W_value_up [U], per head
    score = (q . k + rope(q_r) . rope(k_r)) / sqrt(H + R),  times the factor of YaRN if there is one
    y = sum_n softmax(score_n) v_n W_out_n

k_r, the part of the key that turns with the position, is common to all heads. Softmax in float32, masked by segment as
in `moe.layers.attention`. `decode` keeps c and k_r alone, C + R numbers a position, and never makes keys or values:

    q . k_m = (q W_key_up^T) . c_m            sum_m a_m v_m = (sum_m a_m c_m) W_value_up

Parallelism: `tensor` cuts heads, `context` positions. Latents are made where the stream holds the token and gathered
over tensor, Q + C + R numbers a position instead of D; outputs are scattered back. Else as `moe.kernels.attend` says.
For `save_attention` (`moe.models.remat`) latents and mixed values are kept, not the wider queries, keys and values.
Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1 and appendix C); DeepSeek-V3 (arXiv 2412.19437, eq. 1-11).
Differs from the papers: RMSNorm on both latents and neighbouring rotary pairs, as in the released code.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
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
class LatentAttentionConfig(SublayerConfig):
    """Multi-head latent attention; the widths of DeepSeek-V3 are 128 heads, 1536, 512, 128, 64 and 128."""

    label: ClassVar[str] = "attention"
    mixes_tokens: ClassVar[bool] = True
    output_scale: ClassVar[float] = 0.283

    num_heads: int = 4
    """N."""
    query_latent: int = 64
    """Q, width of the vector that queries come from; 0: they come from the input itself."""
    key_value_latent: int = 32
    """C, width of the vector that keys and values come from, which is cached."""
    head_width: int = 32
    """H, dimensions of a head's query and key that know no position."""
    rope_width: int = 16
    """R, dimensions of a head's query, and of the one key of all heads, that turn with the position; even."""
    value_width: int = 32
    """U, dimensions of a head's value."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope: RopeConfig = RopeConfig(interleaved=True)
    norm_eps: float = 1e-6
    """Epsilon of the latents' norms."""
    attend: AttendConfig = AttendConfig()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_heads=1, query_latent=0, key_value_latent=1, head_width=1, rope_width=2)
        yield from at_least(self, value_width=1)
        if self.rope_width % 2:
            yield "rope_width", "must be even"
        for limit in self.rope.theta_problems(self.rope_theta):
            yield "rope_theta", limit
        if not self.norm_eps > 0:
            yield "norm_eps", "must be greater than 0"
        if self.rope.width:
            yield "rope.width", "must be 0: rope_width says how many dimensions turn"

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "LatentAttention":
        return LatentAttention(self, key, width, init_std, out_std)

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        yield "num_heads", self.num_heads, "tensor"
        # Both cut, together, the latents of the matrices that lead out of them.
        yield "query_latent", self.query_latent, "fsdp * context"
        yield "key_value_latent", self.key_value_latent, "fsdp * context"

    def multiply_adds(self, width: int, seq_len: int) -> float:
        N, Q, C, H, R, U = self._sizes
        query = width * Q + Q * N * (H + R) if Q else width * N * (H + R)
        key_value = width * (C + R) + C * N * (H + U)
        # Scores and mixing: N (H + R + U) S, of which a causal mask leaves half.
        return query + key_value + N * U * width + N * (H + R + U) * seq_len / 2

    @property
    def _sizes(self) -> tuple[int, int, int, int, int, int]:
        """N, Q, C, H, R, U."""
        latents = (self.query_latent, self.key_value_latent)
        return (self.num_heads, *latents, self.head_width, self.rope_width, self.value_width)


class LatentCache(NamedTuple):
    """What the positions so far leave behind, for decoding."""

    latent_BSC: jax.Array
    key_BSR: jax.Array
    """Rotated."""
    length: jax.Array
    """int32 positions filled."""


class LatentAttention(Sublayer):
    """x [B, S, D] -> [B, S, D] in the dtype of x."""

    def __init__(self, config: LatentAttentionConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        self.config = config
        N, Q, C, H, R, U = config._sizes
        keys = jax.random.split(key, 6)
        if Q:
            self.w_query_down = param.normal(keys[0], (width, Q), ("embed", "latent"), init_std)
            self.query_norm = RMSNorm(Q, config.norm_eps)
        heads = ("embed", "heads", "head_width")
        self.w_query_up = param.normal(keys[1], (Q or width, N, H + R), heads, init_std)
        self.w_key_value_down = param.normal(keys[2], (width, C + R), ("embed", "latent"), init_std)
        self.key_value_norm = RMSNorm(C, config.norm_eps)
        self.w_key_up = param.normal(keys[3], (C, N, H), heads, init_std)
        self.w_value_up = param.normal(keys[4], (C, N, U), heads, init_std)
        self.w_out = param.normal(keys[5], (N, U, width), ("heads", "head_width", "embed"), out_std)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, None]:
        query, key, value = self._project(x_BSD, context.position_BS)
        mixed_BSNU = attend(query, key, value, context.segment_BS, self.config.attend, self._scale)
        return self._out(mixed_BSNU), None

    def empty_cache(self, batch: int, length: int, dtype: Any) -> LatentCache:
        C, R = self.config.key_value_latent, self.config.rope_width
        return LatentCache(jnp.zeros((batch, length, C), dtype), jnp.zeros((batch, length, R), dtype), jnp.int32(0))

    def decode(
        self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: LatentCache
    ) -> tuple[jax.Array, LatentCache]:
        """The same for S new positions of one document that follow the `cache.length` cached ones."""
        S, H = x_BSD.shape[1], self.config.head_width
        query, latent_BSC, key_BSR = self._latents(x_BSD, context.position_BS)
        at_most_S1 = cache.length + jnp.arange(S)[:, None]
        start = (0, cache.length, 0)
        cache = LatentCache(
            jax.lax.dynamic_update_slice(cache.latent_BSC, latent_BSC.astype(cache.latent_BSC.dtype), start),
            jax.lax.dynamic_update_slice(cache.key_BSR, key_BSR.astype(cache.key_BSR.dtype), start),
            cache.length + S,
        )
        w_key_CNH, w_value_CNU = (w[...].astype(x_BSD.dtype) for w in (self.w_key_up, self.w_value_up))
        query_BSNC = jnp.einsum("bsnh,cnh->bsnc", query[..., :H], w_key_CNH)
        query = jnp.concatenate([query_BSNC, query[..., H:]], axis=-1)
        key = jnp.concatenate([cache.latent_BSC, cache.key_BSR], axis=-1)[:, :, None].astype(x_BSD.dtype)
        mask_11SX = (jnp.arange(key.shape[1]) <= at_most_S1)[None, None]
        value = cache.latent_BSC[:, :, None].astype(x_BSD.dtype)
        mixed_BSNC = attend_masked(query, key, value, mask_11SX, self._scale)
        return self._out(jnp.einsum("bsnc,cnu->bsnu", mixed_BSNC, w_value_CNU)), cache

    def _latents(self, x_BSD: jax.Array, position_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, N, H + R], latents [B, S, C] of keys and values, the rotated key [B, S, R] of all heads."""
        config = self.config
        C, H = config.key_value_latent, config.head_width
        turn = lambda x_BSNR: rotate(x_BSNR, position_BS, config.rope_theta, config.rope)  # noqa: E731

        def kept(latent: jax.Array) -> jax.Array:
            # Latents of a token are made once, where the stream holds it; then they, not the wider x, are gathered.
            latent = constrain(constrain(latent, "batch", "stream", None), "batch", "position", None)
            return checkpoint_name(latent, ATTENTION_NAME)

        down = lambda w: project("bsd,dc->bsc", x_BSD, w[...], (None, None))  # noqa: E731
        hidden = self.query_norm(down(self.w_query_down)) if config.query_latent else x_BSD
        query = project("bsq,qnx->bsnx", kept(hidden), self.w_query_up[...], (None, "heads", None))
        query = constrain(query, "batch", "position", "heads", None)
        query = jnp.concatenate([query[..., :H], turn(query[..., H:])], axis=-1)
        both_BSX = down(self.w_key_value_down)
        latent_BSC, key_BSR = self.key_value_norm(both_BSX[..., :C]), turn(both_BSX[:, :, None, C:])[:, :, 0]
        return query, kept(latent_BSC), kept(key_BSR)

    def _project(self, x_BSD: jax.Array, position_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys [B, S, N, H + R], values [B, S, N, U]."""
        query, latent_BSC, key_BSR = self._latents(x_BSD, position_BS)
        up = lambda w: project("bsc,cnh->bsnh", latent_BSC, w[...], (None, "heads", None))  # noqa: E731
        key, value = (constrain(up(w), "batch", "position", "heads", None) for w in (self.w_key_up, self.w_value_up))
        key_BSNR = jnp.broadcast_to(key_BSR[:, :, None], (*key.shape[:3], key_BSR.shape[-1]))
        return query, jnp.concatenate([key, key_BSNR], axis=-1), value

    def _out(self, mixed_BSNU: jax.Array) -> jax.Array:
        y_BSD = project("bsnu,nud->bsd", mixed_BSNU, self.w_out[...], ("heads", None, None))
        return constrain(y_BSD, "batch", "stream", None)

    @property
    def _scale(self) -> float:
        return self.config.rope.score_scale / math.sqrt(self.config.head_width + self.config.rope_width)
