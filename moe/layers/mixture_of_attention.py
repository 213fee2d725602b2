"""Mixture of attention: E attention experts, all of them active, mixed token by token by a soft router.

    g = softmax(x W_router) float32 [E];   y_t = sum_i g_ti attention_i(x)_t

Every expert attends over the whole document; the mixture is taken at the query's token. Either an expert has queries,
keys, values and output projection of its own ("KV experts": E caches), or keys and values are common to all experts
(`shared_kv`: one cache) and an expert is a W_query and a W_out. An expert is a `moe.layers.attention.Attention`; head
norms belong to what they normalise. Nothing is selected, so nothing is dropped and there are no statistics
(`routed_experts` is 0); the bias is not used. With own keys, parameters and FLOPs of attention are E times those of one
expert; all of them are active.

W_router, as everything else but W_out, starts at `init_std`; W_out at `out_std`. Everything carries gradient.

Kept for the backward pass: the outputs of all experts, [E, B, S, D].
Parallelism: weights of experts are cut over `expert` (and gathered from there, as ZeRO does: every token needs every
expert), heads over `tensor`; one all-reduce over `tensor` a layer.
Source: BAM, Zhang et al. 2024 (arXiv 2408.08274), section 3. Differs from the paper: no difference known. Its parallel
block, where attention and experts read the same input, is a matter of the block, not of this layer.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param
from moe.balance.statistics import Statistics
from moe.config import at_least
from moe.layers.attention import Attention, AttentionConfig, Cache
from moe.layers.base import Sublayer, SublayerConfig
from moe.routing.base import EXACT, EXPERT_AXIS, Context

KEY_VALUE = ("w_key", "w_value", "b_key", "b_value", "key_norm", "value_norm")
"""Parameters of `Attention` that make keys and values."""
_OF_EXPERTS = {"embed": "expert_embed", "heads": "expert_heads", "kv_heads": "expert_kv_heads"}
"""Logical axes of `Attention` as they are called where every expert has weights of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfAttentionConfig(SublayerConfig):
    """Attention experts under a soft router."""

    label: ClassVar[str] = "mixture_of_attention"
    mixes_tokens: ClassVar[bool] = True
    output_scale: ClassVar[float] = AttentionConfig.output_scale

    num_experts: int = 4
    """E, attention experts; every token runs through all of them."""
    attention: AttentionConfig = AttentionConfig()
    """Of one expert."""
    shared_kv: bool = False
    """Keys and values are common to all experts, and so is their cache."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_experts=2)

    @property
    def head_norm(self) -> str:
        """What the experts normalise per head."""
        return self.attention.head_norm

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "MixtureOfAttention":
        return MixtureOfAttention(self, key, width, init_std, out_std)

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        yield "num_experts", self.num_experts, "expert"
        for field, size, axis in self.attention.divisible():
            yield f"attention.{field}", size, axis
            yield f"attention.{field}", size, "expert_tensor"

    def multiply_adds(self, width: int, seq_len: int) -> float:
        """E times those of an expert; with shared keys, 2 D M H of them once. The router is not counted."""
        common = 2 * width * self.attention.num_kv_heads * self.attention.head_width if self.shared_kv else 0
        return self.num_experts * (self.attention.multiply_adds(width, seq_len) - common) + common


class MixtureOfAttention(Sublayer):
    """x [B, S, D] -> y [B, S, D] in the dtype of x; router and mixture are float32.

    Parameters of `experts` are those of an `Attention` with a leading dimension of E, but for common keys and values;
    so are the keys and values of its cache.
    """

    def __init__(self, config: MixtureOfAttentionConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        self.config = config
        E = config.num_experts
        router, experts = jax.random.split(key)
        self.w_router = param.normal(router, (width, E), ("embed", EXPERT_AXIS), init_std)
        self.experts = param.stack(
            lambda key: Attention(config.attention, key, width, init_std, out_std), jax.random.split(experts, E)
        )
        for path, part in nnx.iter_graph(self.experts):
            if isinstance(part, nnx.Param) and config.shared_kv and path[0] in KEY_VALUE:
                part.set_value(part.get_value()[0])
            elif isinstance(part, nnx.Param) and len(one := part.get_metadata()[param.AXES_KEY]) > 1:
                # Gains and biases stay vectors: they do not decay.
                part.set_metadata(param.AXES_KEY, ("experts", *(_OF_EXPERTS.get(name, name) for name in one)))

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        def run(weights: Any) -> jax.Array:
            return param.bind(self.experts, weights)(x_BSD, context, bias_E)[0]

        weights, dimension = self._weights()
        return self._mix(x_BSD, jax.vmap(run, (dimension,))(weights)), None

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        one = self.experts.empty_cache(batch, length, dtype)
        own = lambda a: a if self.config.shared_kv else jnp.broadcast_to(a, (self.config.num_experts, *a.shape))  # noqa: E731
        return Cache(own(one.key_BSMH), own(one.value_BSMH), one.length)

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        def run(weights: Any, cache: Cache) -> tuple[jax.Array, Cache]:
            return param.bind(self.experts, weights).decode(x_BSD, context, bias_E, cache)

        weights, dimension = self._weights()
        own: Any = None if self.config.shared_kv else 0
        caches: Any = Cache(own, own, None)  # type: ignore[arg-type]  # dimensions in the place of arrays
        y_EBSD, cache = jax.vmap(run, (dimension, caches), (0, caches))(weights, cache)
        return self._mix(x_BSD, y_EBSD), cache

    def _weights(self) -> tuple[dict[str, Any], dict[str, int | None]]:
        """Parameters of the experts, and which dimension of them counts experts."""
        weights = param.pure(self.experts)
        return weights, {name: None if self.config.shared_kv and name in KEY_VALUE else 0 for name in weights}

    def _mix(self, x_BSD: jax.Array, y_EBSD: jax.Array) -> jax.Array:
        logits_BSE = jnp.einsum("bsd,de->bse", x_BSD.astype(jnp.float32), self.w_router[...], precision=EXACT)
        mixed_BSD = jnp.einsum("bse,ebsd->bsd", jax.nn.softmax(logits_BSE), y_EBSD.astype(jnp.float32))
        return mixed_BSD.astype(x_BSD.dtype)
