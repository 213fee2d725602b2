"""Gated MLP (SwiGLU): y = (silu(x W_gate) * (x W_up)) W_down. Dense layers and shared experts.

Source: Shazeer 2020 (arXiv 2002.05202), eq. 6. Differs from the paper: no difference known.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
from flax import nnx

from moe import param
from moe.axes import constrain
from moe.config import at_least
from moe.kernels.project import project
from moe.layers.base import Sublayer, SublayerConfig
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(SublayerConfig):
    """A dense gated MLP."""

    label: ClassVar[str] = "mlp"

    hidden: int = 256
    """Hidden width."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, hidden=1)

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> Sublayer:
        return MLPLayer(key, width, self.hidden, init_std, out_std)

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        yield "hidden", self.hidden, "tensor"

    def multiply_adds(self, width: int, seq_len: int) -> float:
        return 3 * width * self.hidden


class MLP(nnx.Module):
    """x [B, S, D] -> [B, S, D] in the dtype of x, both cut like the residual stream; without a mesh x [..., D].

    Collectives: with tensor > 1 an all-gather of x over tensor and a reduce-scatter of y.
    """

    def __init__(self, key: jax.Array, width: int, hidden: int, init_std: float, out_std: float):
        gate, up, down = jax.random.split(key, 3)
        self.w_gate = param.normal(gate, (width, hidden), ("embed", "mlp"), init_std)
        self.w_up = param.normal(up, (width, hidden), ("embed", "mlp"), init_std)
        self.w_down = param.normal(down, (hidden, width), ("mlp", "embed"), out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        whole = ("batch", "position", None)
        gate, up = (project("...d,df->...f", x, w[...], (None, "mlp"), whole) for w in (self.w_gate, self.w_up))
        hidden = constrain(jax.nn.silu(gate) * up, "batch", "position", "mlp")
        return constrain(project("...f,fd->...d", hidden, self.w_down[...], ("mlp", None)), "batch", "stream", None)


class MLPLayer(MLP, Sublayer):
    """`MLP` between two points of the residual stream."""

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, None]:  # type: ignore[override]
        return MLP.__call__(self, x_BSD), None
