"""PEER: n^2 experts of one hidden unit each, of which every head of a token runs the best K.

    y = sum_h sum_k w_hk gelu(<U[slot_hk], x>) V[slot_hk];   w = softmax over the K scores of a head, or relu(score)

Slots and scores come from `moe.layers.product_keys`, which also says what a large table costs over a mesh: here two of
them, and one all-reduce of H K numbers a token over the axes that cut their width. Mixes no tokens, drops none, returns
no statistics (`routed_experts` is 0: no balance rule sees its slots), uses neither bias nor context.

Gradient reaches the at most H K rows of U and V that a token reads, and the keys through the weights alone.
Initial weights: queries and U `init_std`, keys uniform within +-Q^-1/2, V `out_std`.

Source: He 2024 (arXiv 2407.04153), eq. 1-3 (from memory, not verified); relu is an option of
github.com/lucidrains/PEER-pytorch. Differs from the paper: queries are normalised by RMSNorm, not batch normalisation;
every head has keys of its own, where the paper's heads share theirs (from memory, not verified).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe import param
from moe.axes import constrain
from moe.balance.statistics import Statistics
from moe.layers.base import Sublayer
from moe.layers.product_keys import TABLE_AXES, ProductKeys, ProductKeysConfig, rows, to_slices, weighted_sum
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class PEERConfig(ProductKeysConfig):
    """A layer of n^2 experts of one hidden unit each."""

    label: ClassVar[str] = "memory"

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "PEER":
        return PEER(self, key, width, init_std, out_std)

    def multiply_adds(self, width: int, seq_len: int) -> float:
        """D H Q + H n Q + 2 H K D."""
        return self.lookup_multiply_adds(width) + 2 * self.num_heads * self.num_selected * width


class PEER(Sublayer):
    """x [B, S, D] -> y [B, S, D] in the dtype of x; scores, weights and hidden units are float32."""

    def __init__(self, config: PEERConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        self.config = config
        lookup, up, down = jax.random.split(key, 3)
        self.lookup = ProductKeys(config, lookup, width, init_std)
        self.w_up = param.normal(up, (config.num_slots, width), TABLE_AXES, init_std)
        self.w_down = param.normal(down, (config.num_slots, width), TABLE_AXES, out_std)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        slot_BSR, weight_BSR = self.lookup(x_BSD)
        up_BSRD = rows(self.w_up, slot_BSR, x_BSD.dtype)
        hidden_BSR = jnp.einsum("bsd,bsrd->bsr", to_slices(x_BSD), up_BSRD, preferred_element_type=jnp.float32)
        hidden_BSR = constrain(hidden_BSR, "memory_batch", "memory_position", None)
        weight_BSR = constrain(weight_BSR, "memory_batch", "memory_position", None)
        weight_BSR = weight_BSR * jax.nn.gelu(hidden_BSR, approximate=False)
        return weighted_sum(weight_BSR, rows(self.w_down, slot_BSR, x_BSD.dtype)), None
