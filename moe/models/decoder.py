"""Decoder-only transformer with MoE layers at a configurable rhythm, run by `jax.lax.scan` over stacked layers.

Compile time and program size do not grow with depth: a stack of equal patterns is one loop. Parameters are float32;
`compute_dtype` is the dtype of activations and matrix products; norms, softmax, router and logits are float32.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies

from moe import param
from moe.axes import constrain
from moe.balance.statistics import Statistics
from moe.config import at_least, check
from moe.layers.attention import AttentionConfig, Cache
from moe.layers.moe import MoEConfig
from moe.layers.norm import RMSNorm
from moe.models.block import Block
from moe.models.layout import DENSE, MOE, Stack, layer_kinds, stacks
from moe.routing.base import SAVED_NAME, Context

_save_router = checkpoint_policies.save_only_these_names(SAVED_NAME)
_POLICIES: dict[str, Callable[..., Any]] = {
    "full": _save_router,
    "dots": checkpoint_policies.save_from_both_policies(
        checkpoint_policies.dots_with_no_batch_dims_saveable, _save_router
    ),
}
Caches = tuple[tuple[Cache, ...], ...]
"""For every stack, for every block of its pattern: keys and values [R, B, X, M, H] and length [R] of its R repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Decoder-only transformer."""

    vocab_size: int = 258
    """V; at least the tokenizer's (bytes: 256 and two document marks)."""
    width: int = 128
    """D."""
    num_layers: int = 4
    """L."""
    dense_layers: int = 0
    """Leading layers with a dense MLP whatever the rhythm."""
    moe_every: int = 1
    """Rhythm: after the dense layers, every so many layers the last one has experts."""
    mlp_hidden: int = 0
    """Hidden width of the dense layers' MLP; 0 if every layer is MoE."""
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig | None = MoEConfig()
    tie_embeddings: bool = True
    """Use the token embedding as output projection too."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and matrix products; parameters and statistics stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or all. Router outputs are kept."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections get init_std / sqrt(2 L)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, vocab_size=2, width=2, num_layers=1, dense_layers=0, moe_every=1)
        if self.dense_layers > self.num_layers:
            yield "dense_layers", f"must be at most num_layers = {self.num_layers}"
        if self.moe is not None and not self.num_moe_layers:
            yield (
                "moe_every",
                f"leaves no MoE layer among num_layers = {self.num_layers}; set moe=None for a dense model",
            )
        num_dense = self.kinds.count(DENSE)
        if num_dense and self.mlp_hidden < 1:
            yield "mlp_hidden", f"must be at least 1: {num_dense} of {self.num_layers} layers are dense"
        if not num_dense and self.mlp_hidden != 0:
            yield "mlp_hidden", "is ignored, as no layer is dense; leave it at 0"
        if not self.init_std > 0:
            yield "init_std", "must be greater than 0"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every layer, in order."""
        return layer_kinds(self.num_layers, self.dense_layers, self._every)

    @property
    def layout(self) -> tuple[Stack, ...]:
        """The layers as the model's scans: one tuple of stacks for parameters and caches alike."""
        return stacks(self.num_layers, self.dense_layers, self._every)

    @property
    def _every(self) -> int:
        return self.moe_every if self.moe is not None else self.num_layers + 1

    @property
    def num_moe_layers(self) -> int:
        return self.kinds.count(MOE)

    @property
    def exists_LE(self) -> np.ndarray:
        """bool, for every MoE layer in order: True for its experts, False up to the number of the widest layer."""
        widths = [self.moe.num_experts] * self.num_moe_layers if self.moe is not None else []
        return np.arange(max(widths, default=1)) < np.array(widths, int).reshape(-1, 1)

    def build(self, key: jax.Array) -> "Decoder":
        return Decoder(self, key)

    def abstract(self) -> "Decoder":
        """The decoder with shapes instead of values."""
        return jax.eval_shape(lambda: Decoder(self, jax.random.key(0)))


class Decoder(nnx.Module):
    """tokens -> logits [B, S, V] float32, and the statistics of the MoE layers stacked [L, B, ...] (None if dense)."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        check(config, "model")
        self.config = config
        out_std = config.init_std / math.sqrt(2 * config.num_layers)
        embed, blocks, head = jax.random.split(key, 3)
        V, D = config.vocab_size, config.width
        self.embedding = param.normal(embed, (V, D), ("vocab", "embed"), config.init_std)
        keys = iter(jax.random.split(blocks, config.num_layers))

        def make(kind: str, repeats: int) -> Block:
            def block(key: jax.Array) -> Block:
                return Block(
                    kind, key, width=D, mlp_hidden=config.mlp_hidden, attention=config.attention, moe=config.moe,
                    init_std=config.init_std, out_std=out_std,
                )  # fmt: skip

            return param.stack(block, jnp.stack([next(keys) for _ in range(repeats)]))

        self.stacks = nnx.List(nnx.List(make(kind, stack.repeats) for kind in stack.pattern) for stack in config.layout)
        self.final_norm = RMSNorm(D)
        if not config.tie_embeddings:
            self.head = param.normal(head, (D, V), ("embed", "vocab"), config.init_std)

    def __call__(self, context: Context, bias_LE: jax.Array) -> tuple[jax.Array, Statistics | None]:
        x_BSD = self.embed(context.token_BS)
        collected = []
        first = 0
        for blocks, bias in zip(self.stacks, self.split_bias(bias_LE), strict=True):
            x_BSD, sums = self._run(blocks, x_BSD, context, bias, first)
            collected.append(sums)
            first += bias.shape[0]
        stats = [sums for sums in collected if sums is not None]
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
        return self.unembed(x_BSD), joined

    def decode(self, context: Context, bias_LE: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        """Reads S new tokens of every sequence, which follow the cached ones: (logits float32 [B, V], caches).

        The logits are those of the last position alone: what comes next. `caches` is made by
        `moe.models.sample.init_cache`; a position beyond its length is not refused, it overwrites the last ones.
        Equal to `__call__` on cached and new tokens together, but for dispatchers that drop.
        """
        x_BSD = self.embed(context.token_BS)
        filled, first = [], 0
        for blocks, bias, cache in zip(self.stacks, self.split_bias(bias_LE), caches, strict=True):
            x_BSD, cache = self._run_cached(blocks, x_BSD, context, bias, first, cache)
            filled.append(cache)
            first += bias.shape[0]
        return self.unembed(x_BSD[:, -1:])[:, 0], tuple(filled)

    def embed(self, token_BS: jax.Array) -> jax.Array:
        # The rows are gathered from a table that is whole in D: cut in D over fsdp, XLA would replicate the result.
        table_VD = constrain(self.embedding[...].astype(jnp.dtype(self.config.compute_dtype)), "vocab", None)
        # Times sqrt(D), so that tied embeddings of standard deviation 0.02 start the residual stream in range.
        x_BSD = jnp.take(table_VD, token_BS, axis=0) * math.sqrt(self.config.width)
        return constrain(x_BSD, "batch", "position", None)

    def unembed(self, x_BSD: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            x_BSD = self.final_norm(x_BSD)
            head_DV = self.embedding[...].T if self.config.tie_embeddings else self.head[...]
            logits = jnp.einsum("bsd,dv->bsv", x_BSD, head_DV.astype(x_BSD.dtype), preferred_element_type=jnp.float32)
            return constrain(logits, "batch", "position", "vocab")

    def _run(
        self, blocks: Any, x_BSD: jax.Array, context: Context, bias_RE: jax.Array, first: int
    ) -> tuple[jax.Array, Statistics | None]:
        """One scan over the repeats of a pattern of blocks; statistics come back stacked in layer order."""
        graph, state = nnx.split(blocks)
        layers = first + jnp.arange(bias_RE.shape[0])  # no two layers of the model share a random key

        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Statistics | None]:
            params, bias_E, layer = scanned
            here = dataclasses.replace(context, key=jax.random.fold_in(context.key, layer))
            sums = None
            for block in nnx.merge(graph, params):
                x, found = block(x, here, bias_E)
                sums = found if found is not None else sums
            return x, sums

        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=_POLICIES[self.config.remat], prevent_cse=False)
        return jax.lax.scan(body, x_BSD, (state, bias_RE, layers))

    def _run_cached(
        self, blocks: Any, x_BSD: jax.Array, context: Context, bias_RE: jax.Array, first: int, cache: tuple[Cache, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """`_run` with a cache for every block of the pattern, stacked over the repeats like its parameters."""
        graph, state = nnx.split(blocks)
        layers = first + jnp.arange(bias_RE.shape[0])

        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, tuple[Cache, ...]]:
            params, bias_E, layer, before = scanned
            here = dataclasses.replace(context, key=jax.random.fold_in(context.key, layer))
            after = []
            for block, one in zip(nnx.merge(graph, params), before, strict=True):
                x, one = block.decode(x, here, bias_E, one)
                after.append(one)
            return x, tuple(after)

        return jax.lax.scan(body, x_BSD, (state, bias_RE, layers, cache))

    def split_bias(self, bias_LE: jax.Array) -> list[jax.Array]:
        """The rows of the bias for each stack; a stack without experts gets zeros it does not read."""
        parts, first = [], 0
        for blocks in self.stacks:
            repeats = jax.tree.leaves(nnx.state(blocks))[0].shape[0]
            has_experts = any(block.kind == MOE for block in blocks)
            parts.append(bias_LE[first : first + repeats] if has_experts else jnp.zeros((repeats, 1)))
            first += repeats if has_experts else 0
        return parts
