"""The MoE layer: route, dispatch to experts, combine, add the shared expert.

    y_t = sum_k weight_tk * expert_k(x_t)  [+ shared_expert(x_t)]

Router and statistics run outside the expert `shard_map`; statistics are returned, never written, so a recomputed layer
counts once.
"""

import dataclasses
from collections.abc import Iterator

import jax
from flax import nnx

from moe import param
from moe.balance.base import BalanceRule
from moe.balance.load_balance import LoadBalanceConfig
from moe.balance.statistics import Statistics, statistics
from moe.config import at_least
from moe.dispatch import DispatchConfig, DroplessConfig, ExpertWeights, dispatch
from moe.dispatch.sharded import DOWN_AXES, GATE_AXES, UP_AXES
from moe.layers.mlp import MLP
from moe.routing.base import Context, RouterConfig
from moe.routing.topk import TopKConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A layer of routed experts."""

    num_experts: int = 8
    """E."""
    expert_hidden: int = 256
    """F, hidden width of an expert."""
    shared_hidden: int = 0
    """Hidden width of the shared expert every token passes through; 0: none."""
    router: RouterConfig = TopKConfig()
    dispatch: DispatchConfig = DroplessConfig()
    balance: tuple[BalanceRule, ...] = (LoadBalanceConfig(),)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_experts=2, expert_hidden=1, shared_hidden=0)
        if self.router.num_selected > self.num_experts:
            yield "router.num_selected", f"must be at most num_experts = {self.num_experts}"
        names = [rule.name for rule in self.balance]
        for index, name in enumerate(names):
            if name == "lm":  # the language model's own term in the log
                yield f"balance.{index}.name", "must not be 'lm': `loss/lm` is the language-model loss"
            if name in names[:index]:
                yield f"balance.{index}.name", "must differ from the names of the other balance rules"


class MoE(nnx.Module):
    """x [B, S, D] -> y [B, S, D] in the dtype of x, and the layer's statistics."""

    def __init__(self, config: MoEConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        E, D, F = config.num_experts, width, config.expert_hidden
        router, gate, up, down, shared = jax.random.split(key, 5)
        self.router = config.router.build(router, D, E)
        self.dispatcher = config.dispatch.build()
        self.w_gate = param.normal(gate, (E, D, F), GATE_AXES, init_std)
        self.w_up = param.normal(up, (E, D, F), UP_AXES, init_std)
        self.w_down = param.normal(down, (E, F, D), DOWN_AXES, out_std)
        self.shared = MLP(shared, D, config.shared_hidden, init_std, out_std) if config.shared_hidden else None

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics]:
        with jax.named_scope("router"):
            routing = self.router(x_BSD, context, bias_E)
        with jax.named_scope("dispatch"):
            weights = ExpertWeights(*(w[...].astype(x_BSD.dtype) for w in (self.w_gate, self.w_up, self.w_down)))
            y_BSD, dropped_B = dispatch(self.dispatcher, x_BSD, routing, weights)
        with jax.named_scope("statistics"):
            sums = statistics(routing, context.mask_BS, dropped_B)
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, sums
