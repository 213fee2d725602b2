"""Dropless dispatch: assignments sorted by expert, run through grouped matrix products. Exact, drops nothing.

Differs from MegaBlocks (Gale et al. 2022, arXiv 2211.15841), whose idea it is: static blocks in portable XLA, or XLA's
ragged product on TPU, instead of block-sparse kernels. Collectives: none.
"""

import dataclasses

import jax

from moe.dispatch.base import Assignments, DispatchConfig, Dispatcher, ExpertWeights, grouped_mlp
from moe.kernels.grouped import Kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DroplessConfig(DispatchConfig):
    """Every assignment is computed; cost follows the tokens."""

    kernel: Kernel = "auto"
    """Grouped product: blocks of rows in portable XLA, XLA's ragged product, or the one that suits the devices."""

    def build(self) -> Dispatcher:
        return Dropless(self.kernel)


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatcher):
    """See the head of this file."""

    kernel: Kernel

    def compute(self, x_TD: jax.Array, a: Assignments, weights: ExpertWeights, bound: int) -> jax.Array:
        return grouped_mlp(x_TD, a, weights, bound, self.kernel)
