"""Product-key memory: n^2 learned values, of which every head of a token reads the best K.

    y = sum_h sum_k w_hk V[slot_hk];   w = softmax over the K scores of a head, or relu(score)
    gated:  y = (that sum * silu(x W_gate)) W_out

Slots and scores come from `moe.layers.product_keys`, which also says what a large table costs over a mesh. `relu` lets
slots not compete: weights are scores themselves, and a slot with a negative score is not read. Mixes no tokens,
returns no statistics (`routed_experts` is 0: no balance rule sees its slots), uses neither bias nor context.

Gradient reaches the at most H K rows that a token reads, and the keys through the weights alone.

Initial weights: queries `init_std`, keys uniform within +-Q^-1/2. Values: "width" is a standard deviation of D^-1/2, as
Memory+ has; "dense_equivalent" is sqrt(2 / (L n^2)), the fan-in of all slots at once, with L read from
out_std = init_std / sqrt(2 L), so it is 2 out_std / (init_std n). W_gate `init_std`, W_out `out_std`.

Source: Lample et al. 2019 (arXiv 1907.05242), eq. 1-4 (from memory, not verified); relu and the value initialisation
of Csordas et al. 2023 (arXiv 2310.10837), from the code of github.com/RobertCsordas/moe
(layers/lowrank_approximate_2layer.py); gate and output projection of Berges et al. 2024 (arXiv 2412.09764), from the
code of github.com/facebookresearch/memory. Differs from the papers: queries are normalised by RMSNorm; values are not
shared between layers and have no learning rate of their own.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from moe import param
from moe.balance.statistics import Statistics
from moe.layers.base import Sublayer
from moe.layers.product_keys import TABLE_AXES, ProductKeys, ProductKeysConfig, rows, weighted_sum
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductKeyMemoryConfig(ProductKeysConfig):
    """A memory of n^2 values."""

    label: ClassVar[str] = "memory"

    gated: bool = False
    """Multiply by silu(x W_gate) and project (Memory+)."""
    value_init: Literal["width", "dense_equivalent"] = "width"
    """Standard deviation of initial values: D^-1/2, or that of the down projection of a dense layer of n^2 units."""

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "ProductKeyMemory":
        return ProductKeyMemory(self, key, width, init_std, out_std)

    def multiply_adds(self, width: int, seq_len: int) -> float:
        """D H Q + H n Q + H K D, and 2 D^2 where gated."""
        read = self.num_heads * self.num_selected * width
        return self.lookup_multiply_adds(width) + read + (2 * width**2 if self.gated else 0)


class ProductKeyMemory(Sublayer):
    """x [B, S, D] -> y [B, S, D] in the dtype of x; scores and weights are float32."""

    def __init__(self, config: ProductKeyMemoryConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        self.config = config
        lookup, values, gate, out = jax.random.split(key, 4)
        self.lookup = ProductKeys(config, lookup, width, init_std)
        dense = 2 * out_std / (init_std * config.num_keys)
        std = width**-0.5 if config.value_init == "width" else dense
        self.values = param.normal(values, (config.num_slots, width), TABLE_AXES, std)
        if config.gated:
            self.w_gate = param.normal(gate, (width, width), ("embed", "mlp"), init_std)
            self.w_out = param.normal(out, (width, width), ("mlp", "embed"), out_std)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        slot_BSR, weight_BSR = self.lookup(x_BSD)
        y_BSD = weighted_sum(weight_BSR, rows(self.values, slot_BSR, x_BSD.dtype))
        if self.config.gated:
            gate, out = (w[...].astype(x_BSD.dtype) for w in (self.w_gate, self.w_out))
            y_BSD = jnp.einsum("bsf,fd->bsd", y_BSD * jax.nn.silu(x_BSD @ gate), out)
        return y_BSD, None
