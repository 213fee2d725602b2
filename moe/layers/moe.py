"""The MoE layer: route, dispatch to experts, combine, add the shared expert.

    y_t = sum_k weight_tk * expert_k(x_t)
    with a shared expert:  y_t + shared(x_t)                                        shared_combine "add"
                           y_t + sigmoid(x_t w) shared(x_t)                         "sigmoid"
                           a_0 y_t + a_1 shared(x_t),  a = softmax(x_t W)           "softmax"

w and W are float32 and start at zero, so "sigmoid" first halves the shared expert and "softmax" both. "add" with one
expert a token is the residual of PR-MoE, a fixed branch and a correction; "softmax" is how DeepSpeed's code learns it.

Initial weights, `expert_init` "standard": `init_std`, W_down `out_std`, whatever E and F are. "dense_equivalent": the
fan-in of W_down is taken to be all E F hidden units, so that E experts of score 1 are, in function and in variance, a
dense layer of hidden width E F. With s = sqrt(2/L) = 2 out_std / init_std, W_gate and W_up get s / sqrt(D), and W_down

    s / sqrt(2 m E F),   m = E[silu(g)^2],  g ~ N(0, s^2)

which gives the layer's output the variance of a ReLU layer with N(0, s^2/D) and N(0, s^2/(E F)), s^4 / 2, for tokens of
unit variance: hidden units silu(g) u have the variance m s^2 where relu(g) has s^2 / 2. (Weights are truncated at 3
standard deviations, which takes 8 percent off.) The shared expert keeps the standard weights.

Router and statistics run outside the expert `shard_map`; statistics are returned, never written, so a recomputed layer
counts once.
Source: Rajbhandari et al. 2022, DeepSpeed-MoE (arXiv 2201.05596), section 4, and deepspeed/moe/layer.py for "softmax";
the code of Qwen2-MoE for "sigmoid" (from memory, not verified); Csordas et al. 2023 (arXiv 2310.10837) and
github.com/RobertCsordas/moe for "dense_equivalent". Differs from the papers: the combining weights start at zero;
experts are gated, where those of Csordas et al. are ReLU layers, hence m.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe import param
from moe.balance.statistics import Statistics, statistics
from moe.config import at_least
from moe.dispatch import (
    DispatchConfig,
    Dispatcher,
    DroplessConfig,
    ExchangeConfig,
    ExpertWeights,
    RingConfig,
    dispatch,
)
from moe.dispatch.sharded import DOWN_AXES, GATE_AXES, RING, UP_AXES
from moe.layers.base import Sublayer, SublayerConfig
from moe.layers.mlp import MLP
from moe.routing.base import Context, RouterConfig, Routing
from moe.routing.topk import TopKConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(SublayerConfig):
    """A layer of routed experts."""

    label: ClassVar[str] = "moe"

    num_experts: int = 8
    """E."""
    expert_hidden: int = 256
    """F, hidden width of an expert."""
    shared_hidden: int = 0
    """Hidden width of the shared expert every token passes through; 0: none."""
    shared_combine: Literal["add", "sigmoid", "softmax"] = "add"
    """How the shared expert joins the routed ones: added, added with a learned weight, or mixed with them."""
    expert_init: Literal["standard", "dense_equivalent"] = "standard"
    """Initial weights of the routed experts: init_std and out_std, or by fan-in as of one dense layer of E F units."""
    router: RouterConfig = TopKConfig()
    dispatch: DispatchConfig = DroplessConfig()
    exchange: ExchangeConfig = RingConfig()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_experts=2, expert_hidden=1, shared_hidden=0)
        if self.shared_combine != "add" and not self.shared_hidden:
            yield "shared_combine", "is ignored without a shared expert; set shared_hidden"
        for field, limit in self.router.layer_problems(self.num_experts):
            yield f"router.{field}", limit
        if self.dispatch.uses_priority and not self.router.gives_priority:
            yield "dispatch.keep", f"must not be 'priority': the {type(self.router).__name__} gives none as it is set"
        if self.router.gives_priority and not self.dispatch.uses_priority:
            yield "router", "gives a priority that nothing reads: dispatch with CapacityConfig(keep='priority')"

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "MoE":
        return MoE(self, key, width, init_std, out_std)

    @property
    def routed_experts(self) -> int:
        return self.num_experts

    @property
    def active_share(self) -> float:
        return self.router.experts_per_token(self.num_experts) / self.num_experts

    @property
    def router_only_scales(self) -> bool:
        alone = self.router.experts_per_token(self.num_experts) == 1 and not self.shared_hidden
        return alone and self.router.task_gradient

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        yield "num_experts", self.num_experts, "expert"
        yield "expert_hidden", self.expert_hidden, "expert_tensor"
        yield "shared_hidden", self.shared_hidden, "tensor"

    def multiply_adds(self, width: int, seq_len: int) -> float:
        routed = self.router.expert_runs_per_token(self.num_experts, seq_len) * self.expert_hidden
        return 3 * width * (routed + self.shared_hidden)


class MoE(Sublayer):
    """x [B, S, D] -> y [B, S, D] in the dtype of x, and the layer's statistics."""

    def __init__(self, config: MoEConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        E, D, F = config.num_experts, width, config.expert_hidden
        router, gate, up, down, shared = jax.random.split(key, 5)
        self.router = None if config.router.all_layers else config.router.build(router, D, E)
        self.dispatcher, self.exchange = config.dispatch.build(), config.exchange
        self.config = config
        in_std, down_std = init_std, out_std
        if config.expert_init == "dense_equivalent":
            in_std, down_std = _dense_equivalent(D, E * F, 2 * out_std / init_std)
        self.w_gate = param.normal(gate, (E, D, F), GATE_AXES, in_std)
        self.w_up = param.normal(up, (E, D, F), UP_AXES, in_std)
        self.w_down = param.normal(down, (E, F, D), DOWN_AXES, down_std)
        self.shared = MLP(shared, D, config.shared_hidden, init_std, out_std) if config.shared_hidden else None
        self.shared_combine = config.shared_combine
        if config.shared_combine != "add":
            columns = {"sigmoid": 1, "softmax": 2}[config.shared_combine]
            self.w_combine = param.declare(jnp.zeros((D, columns), jnp.float32), ("embed", None))

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics]:
        with jax.named_scope("router"):
            routing = context.routing if self.router is None else self.router(x_BSD, context, bias_E)
            if routing is None:
                raise ValueError("the layer's router decides for all layers, but the context brings no routing")
        with jax.named_scope("dispatch"):
            weights = ExpertWeights(*(w[...].astype(x_BSD.dtype) for w in (self.w_gate, self.w_up, self.w_down)))
            y_BSD, dropped_B = _through_slots(self.dispatcher, x_BSD, routing, weights, self.exchange)
        with jax.named_scope("statistics"):
            sums = statistics(
                routing, context.mask_BS, dropped_B, keep_choices=context.keep_choices, shortfall=context.shortfall,
                need_B=self._need(routing),
            )  # fmt: skip
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                y_BSD = self._combined(x_BSD, y_BSD, self.shared(x_BSD))
        return y_BSD, sums

    def _need(self, routing: Routing) -> jax.Array | None:
        """float32 [B] the capacity that dispatcher and exchange would need to drop nothing; None: neither drops."""
        parts = (self.config.dispatch, self.config.exchange)
        found = [need for part in parts if (need := part.need(routing)) is not None]
        return jax.lax.stop_gradient(jnp.stack(found).max(axis=0)) if found else None

    def _combined(self, x_BSD: jax.Array, routed_BSD: jax.Array, shared_BSD: jax.Array) -> jax.Array:
        if self.shared_combine == "add":
            return routed_BSD + shared_BSD
        logits = jnp.einsum("bsd,dc->bsc", x_BSD.astype(jnp.float32), self.w_combine[...])
        if self.shared_combine == "sigmoid":
            return routed_BSD + jax.nn.sigmoid(logits).astype(x_BSD.dtype) * shared_BSD
        routed, shared = jnp.split(jax.nn.softmax(logits).astype(x_BSD.dtype), 2, axis=-1)
        return routed * routed_BSD + shared * shared_BSD


def _dense_equivalent(width: int, hidden: int, scale: float) -> tuple[float, float]:
    """Standard deviations of (W_gate and W_up, W_down), as the head of this file derives them; `scale` is s."""
    point, weight = np.polynomial.hermite_e.hermegauss(64)
    gate = scale * point
    second_moment = float(weight @ np.square(gate / (1 + np.exp(-gate))) / weight.sum())
    return scale / width**0.5, scale / (2 * second_moment * hidden) ** 0.5


def _through_slots(
    dispatcher: Dispatcher,
    x_BSD: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    exchange: ExchangeConfig = RING,
) -> tuple[jax.Array, jax.Array]:
    """`dispatch`; where the router assigns mixtures of tokens, the slots take the tokens' place on the way."""
    if (slots := routing.slots) is None:
        return dispatch(dispatcher, x_BSD, routing, weights, exchange)
    x_BPD = jnp.einsum("bps,bsd->bpd", slots.gather_BPS.astype(x_BSD.dtype), x_BSD)
    y_BPD, dropped_B = dispatch(dispatcher, x_BPD, dataclasses.replace(routing, slots=None), weights, exchange)
    return jnp.einsum("bsp,bpd->bsd", slots.scatter_BSP.astype(x_BSD.dtype), y_BPD), dropped_B
