"""The sublayer contract: what a decoder can put between two points of its residual stream.

Attention, MLP, experts, memories and combinations of them are all sublayers: a block layout is a list of their configs
(see `moe.models.layout`), and the decoder neither knows nor asks what they are.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
from flax import nnx

from moe.balance.statistics import Statistics
from moe.routing.base import Context


class Sublayer(nnx.Module):
    """x [B, S, D] -> y [B, S, D] in the dtype of x, to be added to the residual stream. Writes nothing."""

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        """(y, statistics of its routing; None unless its config has `routed_experts`)."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Any:
        """What `decode` remembers of the positions so far, as a pytree of arrays; () if tokens do not mix."""
        return ()

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The same for S new positions that follow the cached ones. The default is for layers that mix no tokens."""
        return self(x_BSD, context, bias_E)[0], cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class SublayerConfig:
    """Base of every sublayer's config; its type selects the sublayer."""

    label: ClassVar[str] = "layer"
    """Name of the sublayer in the paths of its parameters."""
    mixes_tokens: ClassVar[bool] = False
    """Whether a token's output depends on other tokens by design, as in attention."""
    output_scale: ClassVar[float] = 0.432
    """Standard deviation a sandwich norm gives the output at step 0, times sqrt(depth): `moe.models.residual`."""

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> Sublayer:
        """`out_std` is for the weights that write into the residual stream, `init_std` for all others."""
        raise NotImplementedError(f"{type(self).__name__} must define build")

    @property
    def routed_experts(self) -> int:
        """E of the statistics it returns and the expert bias it takes; 0 if it returns none."""
        return 0

    @property
    def active_share(self) -> float:
        """Share of the parameters on the axes `experts` and `memory_slots` that one token passes through."""
        return 1.0

    @property
    def router_only_scales(self) -> bool:
        """Whether all that teaches the router is a factor on a token's whole output, which a norm would divide out."""
        return False

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        """(field, size, mesh axis) for every size that the mesh axis must divide, or the product of "a * b"."""
        yield from ()

    def multiply_adds(self, width: int, seq_len: int) -> float:
        """Multiply-adds of one token's forward pass, matrix products alone."""
        raise NotImplementedError(f"{type(self).__name__} must define multiply_adds")
