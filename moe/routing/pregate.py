"""Pre-gating: one small causal router reads the token embeddings and decides once for every layer.

    h = x W_in                                    x: the model's token embeddings, before its first layer
    h = h + attention(norm(h))                    one causal block of N heads inside a document
    h = h + relu(norm(h) W_up)^2 W_down
    z = norm(h) W_router;   p = softmax(z);   chosen = top-K of stop_gradient(p) + bias;   weight = p_chosen | p / sum

Because nothing above the embeddings enters, the experts of all layers are known before the first layer runs: that is
what lets a server fetch them in time and batch tokens by path. The decoder calls the router once and every MoE layer
follows it (`RouterConfig.all_layers`); expert i of every layer is then the same "domain".

Gradient: through the weights of all layers at once, so the task teaches the router. Collectives: none.
Source: Cai et al. 2024, Read-ME (arXiv 2410.19123, section 3): one causal transformer block apart from the backbone.
Differs from the paper: it reads the model's embeddings instead of its own; no rotary positions (the causal mask alone
tells positions apart); weights multiply the experts' outputs, where the released code uses a hard mask and teaches the
router by distillation only (equation 4; upcycling is not part of a router); squared ReLU instead of SwiGLU.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe import param
from moe.config import at_least
from moe.routing.base import EXACT, EXPERT_AXIS, Context, Router, Routing, TokenChoiceConfig
from moe.routing.choice import token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreGateConfig(TokenChoiceConfig):
    """One causal router for all layers."""

    all_layers: ClassVar[bool] = True

    normalise: Literal["none", "sum"] = "none"
    """Combine weights: the probabilities as they are, or divided by their sum over the K."""
    hidden: int = 64
    """Width of the router's own block."""
    num_heads: int = 4
    """Heads of the router's attention; hidden must be divisible by it."""
    init_std: float = 0.02
    """Standard deviation of the initial weights that write: W_out, W_down, W_router; the others' is fan-in^-1/2."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_selected=1, hidden=1, num_heads=1, init_std=0)
        if self.num_heads >= 1 and self.hidden % self.num_heads:
            yield "hidden", f"must be divisible by num_heads = {self.num_heads}"
        if self.num_selected == 1 and self.normalise != "none":
            yield "normalise", "must be 'none' when num_selected is 1: the weight would be 1 and the router never learn"

    def build(self, key: jax.Array, width: int, num_experts: int) -> "PreGate":
        return PreGate(self, key, width, num_experts)


class Read(NamedTuple):
    """Keys and values of the positions the router has read."""

    key_BSNH: jax.Array
    value_BSNH: jax.Array
    length: jax.Array
    """int32 positions filled."""


class PreGate(Router):
    """x [B, S, D], the token embeddings -> Routing with R = S * K."""

    def __init__(self, config: PreGateConfig, key: jax.Array, width: int, num_experts: int):
        self.config = config
        G, std = config.hidden, config.init_std
        keys = jax.random.split(key, 6)
        self.w_in = param.normal(keys[0], (width, G), ("embed", None), max(std, width**-0.5))
        self.w_qkv = param.normal(keys[1], (3, G, G), (None, None, None), G**-0.5)
        self.w_out = param.normal(keys[2], (G, G), (None, None), std)
        self.w_up = param.normal(keys[3], (G, 4 * G), (None, None), G**-0.5)
        self.w_down = param.normal(keys[4], (4 * G, G), (None, None), std)
        self.w_router = param.normal(keys[5], (G, num_experts), (None, EXPERT_AXIS), std)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        S = x_BSD.shape[1]
        same_BSS = context.segment_BS[:, :, None] == context.segment_BS[:, None, :]
        hidden_BSG, query, key, value = self._read(x_BSD)
        mixed_BSG = self._mix(query, key, value, jnp.tril(jnp.ones((S, S), bool)) & same_BSS)
        return self._route(hidden_BSG + mixed_BSG, context, bias_E)

    def empty_cache(self, batch: int, length: int) -> Read:
        N = self.config.num_heads
        zeros = jnp.zeros((batch, length, N, self.config.hidden // N), jnp.float32)
        return Read(zeros, zeros, jnp.zeros((), jnp.int32))

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Any) -> tuple[Routing, Any]:
        hidden_BSG, query, key, value = self._read(x_BSD)
        start = (0, cache.length, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.key_BSNH, key, start)
        values = jax.lax.dynamic_update_slice(cache.value_BSNH, value, start)
        upto_S1 = (cache.length + jnp.arange(x_BSD.shape[1]))[:, None]
        mixed_BSG = self._mix(query, keys, values, (jnp.arange(keys.shape[1]) <= upto_S1)[None])
        routing = self._route(hidden_BSG + mixed_BSG, context, bias_E)
        return routing, Read(keys, values, cache.length + x_BSD.shape[1])

    def _read(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        hidden_BSG = _times(x_BSD.astype(jnp.float32), self.w_in[...])
        B, S = hidden_BSG.shape[:2]
        qkv = jnp.einsum("bsg,pgh->pbsh", _norm(hidden_BSG), self.w_qkv[...], precision=EXACT)
        query, key, value = qkv.reshape(3, B, S, self.config.num_heads, -1)
        return hidden_BSG, query, key, value

    def _mix(self, query: jax.Array, key: jax.Array, value: jax.Array, mask_BSX: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask_BSX[:, None], implementation="xla")
        return _times(mixed.reshape(*mixed.shape[:2], -1), self.w_out[...])

    def _route(self, hidden_BSG: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        up = jnp.square(jax.nn.relu(_times(_norm(hidden_BSG), self.w_up[...])))
        hidden_BSG = hidden_BSG + _times(up, self.w_down[...])
        logits_BSE = _times(_norm(hidden_BSG), self.w_router[...])
        probs_BSE = jax.nn.softmax(logits_BSE, axis=-1)
        select_BSE = probs_BSE + bias_E
        expert_BSK, margin_BS = top_k(select_BSE, self.config.num_selected)
        weight_BSK = jnp.take_along_axis(probs_BSE, expert_BSK, axis=-1)
        if self.config.normalise == "sum":
            weight_BSK = weight_BSK / weight_BSK.sum(axis=-1, keepdims=True)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=weight_BSK,
            probs_BSE=probs_BSE,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=margin_BS,
            select_BSE=select_BSE,
        )


def _times(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, precision=EXACT)


def _norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last dimension."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
