"""Finedeep: one feed-forward layer split into J sub-layers of E small experts, all of them active for every token.

    u = RMSNorm(h_{j-1});   o_ji = expert_ji(u);   s_ji = scale * sigmoid(<w_ji, o_ji>)
    h_j = h_{j-1} + sum_i s_ji o_ji,   j = 1..J

with h_0 = x; the sublayer returns h_J - h_0, which its block adds to the residual stream. Experts are gated MLPs of
hidden width F; parameters and FLOPs are those of a dense MLP of hidden width J E F, but for J E D numbers of the
routers and J norms. Nothing is selected, so nothing is dropped, no token sees another, and there are no statistics
(`routed_experts` is 0); neither bias nor context is used.

h_0 is what the block hands over. Each sub-layer brings its own norm, so a block that normalises first makes h_0 the
normalised stream: the first norm here then only scales, and later ones see norm(h) + ..., not h + ....

The score is computed before the expert's output exists, <w, o> = <hidden, W_down w>, in float32: o_ji, of width D for
every expert, is never stored. A sigmoid starts at 1/2 and so halves every expert; scale = 2 undoes it.

Initial weights: `init_std`; W_down `out_std`. Parallelism: F is cut over `tensor`; one all-reduce a sub-layer.
Source: Finedeep, arXiv 2502.12928, section 3 (structure from secondary accounts, the form of the router from memory,
not verified). Differs from the paper: `scale`; no difference else known.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param
from moe.balance.statistics import Statistics
from moe.config import at_least
from moe.layers.base import Sublayer, SublayerConfig
from moe.layers.norm import RMSNorm
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinedeepConfig(SublayerConfig):
    """Sub-layers of small experts that are always active."""

    label: ClassVar[str] = "finedeep"

    num_sublayers: int = 2
    """J, sub-layers that run one after the other."""
    num_experts: int = 4
    """E, experts of a sub-layer."""
    expert_hidden: int = 64
    """F, hidden width of an expert; J E F is the hidden width of the dense layer this one replaces."""
    scale: float = 1.0
    """Factor of the sigmoid; 2 starts every expert at weight 1."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_sublayers=1, num_experts=1, expert_hidden=1)
        if not self.scale > 0:
            yield "scale", "must be greater than 0"

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "Finedeep":
        return Finedeep(self, key, width, init_std, out_std)

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        yield "expert_hidden", self.expert_hidden, "tensor"

    def multiply_adds(self, width: int, seq_len: int) -> float:
        """3 D J E F; routers are not counted."""
        return 3 * width * self.num_sublayers * self.num_experts * self.expert_hidden


class Experts(nnx.Module):
    """One sub-layer: u [B, S, D] -> sum_i s_i o_i [B, S, D] in the dtype of u; s is float32."""

    def __init__(self, config: FinedeepConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        E, D, F = config.num_experts, width, config.expert_hidden
        gate, up, down, router = jax.random.split(key, 4)
        self.scale = config.scale
        self.norm = RMSNorm(D)
        self.w_gate = param.normal(gate, (E, D, F), (None, "embed", "mlp"), init_std)
        self.w_up = param.normal(up, (E, D, F), (None, "embed", "mlp"), init_std)
        self.w_down = param.normal(down, (E, F, D), (None, "mlp", "embed"), out_std)
        self.w_router = param.normal(router, (E, D), ("router_experts", "embed"), init_std)

    def __call__(self, h_BSD: jax.Array) -> jax.Array:
        gate, up, down = (w[...].astype(h_BSD.dtype) for w in (self.w_gate, self.w_up, self.w_down))
        u_BSD = self.norm(h_BSD)
        hidden_BSEF = jax.nn.silu(jnp.einsum("bsd,edf->bsef", u_BSD, gate)) * jnp.einsum("bsd,edf->bsef", u_BSD, up)
        score_EF = jnp.einsum("efd,ed->ef", self.w_down[...], self.w_router[...])
        score_BSE = jnp.einsum("bsef,ef->bse", hidden_BSEF.astype(jnp.float32), score_EF)
        weight_BSE = (self.scale * jax.nn.sigmoid(score_BSE)).astype(h_BSD.dtype)
        return jnp.einsum("bsef,efd->bsd", hidden_BSEF * weight_BSE[..., None], down)


class Finedeep(Sublayer):
    """x [B, S, D] -> h_J - x [B, S, D] in the dtype of x."""

    def __init__(self, config: FinedeepConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        keys = jax.random.split(key, config.num_sublayers)
        self.sublayers = nnx.List(Experts(config, key, width, init_std, out_std) for key in keys)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        # The sum is kept apart from x, so that h_J - x loses no digits.
        y_BSD = jnp.zeros_like(x_BSD)
        for sublayer in self.sublayers:
            y_BSD = y_BSD + sublayer(x_BSD + y_BSD)
        return y_BSD, None
