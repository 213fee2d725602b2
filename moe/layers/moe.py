"""The MoE layer: route, dispatch to experts, combine, add the shared expert.

    y_t = sum_k weight_tk * expert_k(x_t)  [+ shared_expert(x_t)]

Router and statistics run outside the expert `shard_map`; statistics are returned, never written, so a recomputed layer
counts once.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param
from moe.balance.statistics import Statistics, statistics
from moe.config import at_least
from moe.dispatch import DispatchConfig, Dispatcher, DroplessConfig, ExpertWeights, dispatch
from moe.dispatch.sharded import DOWN_AXES, GATE_AXES, UP_AXES
from moe.layers.mlp import MLP
from moe.routing.base import Context, RouterConfig, Routing
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

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_experts=2, expert_hidden=1, shared_hidden=0)
        for field, limit in self.router.layer_problems(self.num_experts):
            yield f"router.{field}", limit


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
            y_BSD, dropped_B = _through_slots(self.dispatcher, x_BSD, routing, weights)
        with jax.named_scope("statistics"):
            sums = statistics(routing, context.mask_BS, dropped_B)
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, sums


def _through_slots(
    dispatcher: Dispatcher, x_BSD: jax.Array, routing: Routing, weights: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """`dispatch`; where the router assigns mixtures of tokens, the slots take the tokens' place on the way."""
    if (slots := routing.slots) is None:
        return dispatch(dispatcher, x_BSD, routing, weights)
    x_BPD = jnp.einsum("bps,bsd->bpd", slots.gather_BPS.astype(x_BSD.dtype), x_BSD)
    y_BPD, dropped_B = dispatch(dispatcher, x_BPD, dataclasses.replace(routing, slots=None), weights)
    return jnp.einsum("bsp,bpd->bsd", slots.scatter_BSP.astype(x_BSD.dtype), y_BPD), dropped_B
