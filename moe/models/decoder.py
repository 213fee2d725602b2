"""Decoder-only transformer: a residual stream that passes through a list of sublayers, run by `jax.lax.scan`.

The layers follow a rhythm of attention, dense MLP and experts, or are spelled out as stacks (`moe.models.layout`).
Compile time and program size do not grow with depth: a stack is one loop over its repeats. Parameters are float32;
`compute_dtype` is the dtype of activations and matrix products; norms, softmax, router and logits are float32.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe import param
from moe.axes import constrain
from moe.balance.statistics import Statistics
from moe.config import at_least, check, walk
from moe.layers.attention import AttentionConfig
from moe.layers.base import SublayerConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.norm import RMSNorm
from moe.models import output, pipeline, scan
from moe.models.ahead import AheadConfig, Merge, ahead
from moe.models.layout import StackConfig, Stacks, first_block, in_order, rhythm, split_at
from moe.models.output import Predictions
from moe.models.pipeline import PipelineConfig
from moe.models.remat import Remat
from moe.models.residual import Norm, norm_problems
from moe.routing.base import Context, RouterConfig

_RHYTHM = ("num_layers", "dense_layers", "moe_every", "mlp_hidden", "attention", "moe")
Caches = tuple[Any, ...]
"""For every stack, for every sublayer of its pattern: what it remembers, stacked over the stack's R repeats; behind the
stacks, what a router that decides for all layers remembers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Decoder-only transformer."""

    vocab_size: int = 258
    """V; at least the tokenizer's (bytes: 256 and two document marks)."""
    width: int = 128
    """D."""
    num_layers: int = 4
    """L, layers of attention and one feed-forward each."""
    dense_layers: int = 0
    """Leading layers with a dense MLP whatever the rhythm."""
    moe_every: int = 1
    """Rhythm: after the dense layers, every so many layers the last one has experts."""
    mlp_hidden: int = 0
    """Hidden width of the dense layers' MLP; 0 if every layer is MoE."""
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig | None = MoEConfig()
    stacks: tuple[StackConfig, ...] = ()
    """The layers spelled out, in place of the rhythm (num_layers, dense_layers, moe_every, mlp_hidden, attention,
    moe)."""
    norm: Norm = "pre"
    """Where norms stand: on a sublayer's input (pre), behind its residual (post), on input and output (sandwich), on
    attention's heads and behind it (hybrid), or that with an ordinary first block (hybrid_star)."""
    norm_eps: float = 1e-6
    """Epsilon of these norms, the final one and those of `ahead`; norms inside a sublayer have their own."""
    scale_embedding: bool = True
    """Multiply token embeddings by sqrt(D); most published models do not."""
    allow_non_causal: bool = False
    """Allow routers that look at later tokens; the model's loss is then no longer that of a language model."""
    ahead: AheadConfig | None = None
    """Multi-token prediction; None: only the next token is predicted."""
    pipeline: PipelineConfig | None = None
    """How the batch passes through the stages of the mesh; needed with mesh.stages > 1."""
    tie_embeddings: bool = True
    """Use the token embedding as output projection too."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and matrix products; parameters and statistics stay float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: all but what this policy keeps; `moe.models.remat` lists them."""
    logit_chunk: int = 0
    """Tokens of a device whose logits exist at a time in the loss, 0: all. Changes memory, not numbers."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections get init_std / sqrt(number of sublayers)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, vocab_size=2, width=2, logit_chunk=0)
        yield from self._spelled_problems() if self.stacks else self._rhythm_problems()
        yield from norm_problems(self.norm, self.sublayers)
        yield from self._decider_problems()
        for field in [name for name in ("init_std", "norm_eps") if not getattr(self, name) > 0]:
            yield field, "must be greater than 0"
        if self.allow_non_causal and not self.non_causal:
            yield "allow_non_causal", "is ignored, as no router looks at later tokens; leave it False"
        for path in () if self.allow_non_causal else self.non_causal:
            yield path, "looks at later tokens; to train with it all the same set model.allow_non_causal=True"

    def _rhythm_problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_layers=1, dense_layers=0, moe_every=1)
        if self.dense_layers > self.num_layers:
            yield "dense_layers", f"must be at most num_layers = {self.num_layers}"
        if self.moe is not None and not self.num_moe_layers:
            yield (
                "moe_every",
                f"leaves no MoE layer among num_layers = {self.num_layers}; set moe=None for a dense model",
            )
        num_dense = sum(1 for config in in_order(self.trunk) if isinstance(config, MLPConfig))
        if num_dense and self.mlp_hidden < 1:
            yield "mlp_hidden", f"must be at least 1: {num_dense} of {self.num_layers} layers are dense"
        if not num_dense and self.mlp_hidden != 0:
            yield "mlp_hidden", "is ignored, as no layer is dense; leave it at 0"

    def _spelled_problems(self) -> Iterator[tuple[str, str]]:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _RHYTHM:
            if getattr(self, name) != default[name]:
                yield name, "is ignored, as `stacks` spells the layers out; leave it at its default"

    def _decider_problems(self) -> Iterator[tuple[str, str]]:
        paths = [prefix for prefix, config in self.sublayers if _decider(config) is not None]
        if len({_decider(config) for _, config in self.sublayers} - {None}) > 1:
            yield f"{paths[1]}router", f"must be {paths[0]}router, with as many experts: one router decides for all"
        if paths and self.ahead is not None:
            yield "ahead", f"must be None with {paths[0]}router, which does not decide for tokens further ahead"

    @property
    def decider(self) -> tuple[RouterConfig, int] | None:
        """The router that decides once for all layers that name it, and its number of experts; None: there is none."""
        return next((found for _, config in self.sublayers if (found := _decider(config)) is not None), None)

    @property
    def layout(self) -> Stacks:
        """The layers as the model's scans, in the order of their parameters: the trunk, then the blocks of `ahead`."""
        return self.trunk + (self.ahead.stacks(self.trunk) if self.ahead is not None else ())

    @property
    def trunk(self) -> Stacks:
        """The layers that lead to the next token's logits."""
        stacks = self.stacks or rhythm(
            self.attention, MLPConfig(hidden=self.mlp_hidden), self.moe,
            num_layers=self.num_layers, dense_layers=self.dense_layers, every=self.moe_every,
        )  # fmt: skip
        return split_at(stacks, first_block(stacks)) if self.norm == "hybrid_star" else stacks

    @property
    def sublayers(self) -> list[tuple[str, SublayerConfig]]:
        """(what stands before the name of a field in this config, config) for every sublayer, repeats left out."""
        if self.stacks:
            return [
                (f"stacks.{number}.layers.{index}.", config)
                for number, stack in enumerate(self.stacks)
                for index, config in enumerate(stack.layers)
            ]
        found: dict[SublayerConfig, str] = {self.attention: "attention.", MLPConfig(hidden=self.mlp_hidden): "mlp_"}
        if self.moe is not None:
            found[self.moe] = "moe."
        used = set(in_order(self.layout))
        return [(prefix, config) for config, prefix in found.items() if config in used]

    @property
    def non_causal(self) -> list[str]:
        """Paths, in this config, of routers that look at later tokens."""
        parts = walk(self)
        return [path[:-1] for path, part in parts if isinstance(part, RouterConfig) and not part.causal]

    @property
    def num_experts_L(self) -> tuple[int, ...]:
        """E of every MoE layer, in order."""
        return tuple(config.routed_experts for config in in_order(self.layout) if config.routed_experts)

    @property
    def num_moe_layers(self) -> int:
        return len(self.num_experts_L)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Where the MoE layers are: indices of layers, or of sublayers if `stacks` spells them out."""
        where = [index for index, config in enumerate(in_order(self.layout)) if config.routed_experts]
        return tuple(index if self.stacks else index // 2 for index in where)

    @property
    def exists_LE(self) -> np.ndarray:
        """bool, for every MoE layer in order: True for its experts, False up to the number of the widest layer."""
        widths = self.num_experts_L
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
        embed, blocks, head = jax.random.split(key, 3)
        V, D = config.vocab_size, config.width
        self.embedding = param.normal(embed, (V, D), ("vocab", "embed"), config.init_std)
        std, eps = config.init_std, config.norm_eps
        pieces = [config.pipeline.rounds] * len(config.trunk) if config.pipeline is not None else []
        self.stacks = nnx.List(
            scan.build(config.layout, config.norm, blocks, width=D, init_std=std, norm_eps=eps, pieces=pieces)
        )
        self.final_norm = RMSNorm(D, eps)
        if (found := config.decider) is not None:
            self.router = found[0].build(jax.random.fold_in(key, 1), D, found[1])
        if config.ahead is not None:
            keys = jax.random.split(jax.random.fold_in(key, 2), config.ahead.depth)
            self.merges = nnx.List(Merge(one, D, std, eps) for one in keys)
        if not config.tie_embeddings:
            self.head = param.normal(head, (D, V), ("embed", "vocab"), config.init_std)

    def __call__(self, context: Context, bias_LE: jax.Array) -> tuple[jax.Array, Statistics | None]:
        found = self.predict(context, bias_LE)
        return self.logits(found.hidden_BSD), found.statistics

    def predict(self, context: Context, bias_LE: jax.Array) -> Predictions:
        """Hidden vectors in place of logits, for the next token and for what the blocks of `ahead` predict."""
        x_BSD = self.embed(context.token_BS)
        if self.config.decider is not None:
            context = dataclasses.replace(context, routing=self.router(x_BSD, context, self._its_bias(bias_LE)))
        layout, remat, sums = self.config.layout, self.config.remat, []
        stacks = list(zip(self.stacks, scan.given(layout, bias_LE), strict=True))
        trunk = len(self.config.trunk)
        for pattern, given in stacks[:trunk]:
            x_BSD, found = pipeline.run(self.config.pipeline, pattern, x_BSD, context, given, remat)
            sums.append(found)
        hidden_BSD, later = self.final_norm(x_BSD), []
        for offset, (pattern, given) in enumerate(stacks[trunk:], 1):
            here = ahead(context, offset)
            x_BSD = self.merges[offset - 1](x_BSD, self.embed(here.token_BS))
            x_BSD, found = scan.run(pattern, x_BSD, here, given, remat)
            sums.append(found)
            later.append(self.final_norm(x_BSD))
        return Predictions(hidden_BSD, scan.in_layer_order(sums, layout), tuple(later))

    def decode(self, context: Context, bias_LE: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        """Reads S new tokens of every sequence, which follow the cached ones: (logits float32 [B, V], caches).

        The logits are those of the last position alone: what comes next. `caches` is made by
        `moe.models.sample.init_cache`; a position beyond its length is not refused, it overwrites the last ones.
        Equal to `__call__` on cached and new tokens together, but for dispatchers that drop.
        """
        x_BSD = self.embed(context.token_BS)
        filled, behind = [], caches[len(self.config.trunk) :]
        if self.config.decider is not None:
            routing, cache = self.router.decode(x_BSD, context, self._its_bias(bias_LE), behind[0])
            context, behind = dataclasses.replace(context, routing=routing), (cache,)
        given = scan.given(self.config.layout, bias_LE)
        for pattern, here, cache in zip(self.stacks, given, caches[: len(self.config.trunk)], strict=False):
            x_BSD, cache = scan.run_cached(pattern, x_BSD, context, here, cache)
            filled.append(cache)
        return self.unembed(x_BSD[:, -1:])[:, 0], (*filled, *behind)

    def _its_bias(self, bias_LE: jax.Array) -> jax.Array:
        """The bias [E] of the router that decides for all layers: their loads are the same, so their biases are."""
        assert self.config.decider is not None
        configs = [config for config in in_order(self.config.layout) if config.routed_experts]
        row = next(row for row, config in enumerate(configs) if _decider(config) is not None)
        return bias_LE[row, : self.config.decider[1]]

    def embed(self, token_BS: jax.Array) -> jax.Array:
        # The rows are gathered from a table that is whole in D: cut in D over fsdp, XLA would replicate the result.
        table_VD = constrain(self.embedding[...].astype(jnp.dtype(self.config.compute_dtype)), "vocab", None)
        # sqrt(D): tied embeddings of standard deviation 0.02 then start the residual stream in range.
        scale = math.sqrt(self.config.width) if self.config.scale_embedding else 1.0
        x_BSD = constrain(jnp.take(table_VD, token_BS, axis=0), "batch", "position", None)
        return constrain(x_BSD * scale, "batch", "stream", None)

    @property
    def head_DV(self) -> jax.Array:
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """float32 [B, S, V] of hidden vectors from `predict`."""
        return output.logits(hidden_BSD, self.head_DV)

    def nats(self, hidden_BSD: jax.Array, target_BS: jax.Array, real_BS: jax.Array) -> jax.Array:
        """float32 scalar: loss of hidden vectors from `predict`, summed where `real_BS`."""
        return output.nats(hidden_BSD, self.head_DV, target_BS, real_BS, self.config.logit_chunk)

    def unembed(self, x_BSD: jax.Array) -> jax.Array:
        """Logits of the residual stream."""
        return self.logits(self.final_norm(x_BSD))


def _decider(config: SublayerConfig) -> tuple[RouterConfig, int] | None:
    router = getattr(config, "router", None)
    return (router, config.routed_experts) if isinstance(router, RouterConfig) and router.all_layers else None
