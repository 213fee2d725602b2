"""Product keys: the best K of n^2 slots for the price of scoring 2n, and what memories do with the slots found.

    q = norm(x W_query) [H, Q],  halves q1, q2;   s1_i = <q1, k1_i>,  s2_j = <q2, k2_j>,  i, j < n
    score of slot i n + j = s1_i + s2_j;   the best min(K, n) of each half -> their sums -> the best K

Exact: a slot among the best K has its row among the best K of s1 and its column among the best K of s2, because the
score is a sum. Scores are float32. Each head has queries and keys of its own; all heads read the same slots.

Over a mesh a table of slots is cut in its width, never in its slots: every device holds a slice of all rows, so no
device has to ask another for a row, however uneven the slots' load is. The choice of slots is gathered over the axes
that cut the width (8 bytes for every slot a token reads), outputs go back by an all-to-all. The gradient of a table is
dense: as large as the table, made by a scatter-add of H K rows a token, and summed over `data`. An optimizer with
moments or weight decay therefore moves every row at every step, read or not.

Source: Lample et al. 2019 (arXiv 1907.05242), section 3.2 (from memory, not verified). Differs from the paper: queries
are normalised by RMSNorm where it uses batch normalisation, which would couple the tokens of a batch.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.axes import constrain
from moe.config import at_least
from moe.kernels.highest import highest
from moe.layers.base import SublayerConfig
from moe.layers.norm import RMSNorm
from moe.routing.base import EXACT, SAVED_NAME

TABLE_AXES = ("memory_slots", "memory_width")
"""Logical axes of a table with one row for every slot."""
SLICED = ("memory_batch", "memory_position", "memory_width")
"""Logical axes of token vectors [B, S, D] beside a table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductKeysConfig(SublayerConfig):
    """Base of the configs of memories that are addressed by product keys."""

    num_keys: int = 32
    """n, keys of each half: the memory has n^2 slots."""
    num_heads: int = 4
    """H, independent queries of a token; their outputs are summed."""
    num_selected: int = 8
    """K, slots every head reads."""
    key_width: int = 64
    """Q, width of a query; even, because each half of it has its own keys."""
    query_norm: bool = True
    """Normalise queries (RMSNorm over Q, one scale for all heads)."""
    weights: Literal["softmax", "relu"] = "softmax"
    """How scores become weights: softmax over the K of a head, or relu of each by itself."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_keys=1, num_heads=1, num_selected=1, key_width=2)
        if self.num_selected > self.num_slots:
            yield "num_selected", f"must be at most num_keys^2 = {self.num_slots}"
        if self.key_width % 2:
            yield "key_width", "must be even"

    @property
    def num_slots(self) -> int:
        return self.num_keys**2

    @property
    def active_share(self) -> float:
        """H K / n^2, at most 1. An upper bound: heads may read the same slot."""
        return min(1.0, self.num_heads * self.num_selected / self.num_slots)

    def lookup_multiply_adds(self, width: int) -> float:
        """D H Q for the queries and H n Q for the scores of both halves."""
        return self.num_heads * self.key_width * (width + self.num_keys)


class ProductKeys(nnx.Module):
    """x [B, S, D] any float dtype -> (slot int32 [B, S, R], weight float32 [B, S, R]), R = H K, head by head.

    Weights carry gradient to x, queries and keys; slots carry none.
    """

    def __init__(self, config: ProductKeysConfig, key: jax.Array, width: int, init_std: float):
        self.config = config
        H, Q = config.num_heads, config.key_width
        query, keys = jax.random.split(key)
        self.w_query = param.normal(query, (width, H, Q), ("embed", None, None), init_std)
        bound = Q**-0.5
        shape = (2, H, config.num_keys, Q // 2)
        self.keys = param.declare(jax.random.uniform(keys, shape, jnp.float32, -bound, bound), (None,) * 4)
        self.query_norm = RMSNorm(Q) if config.query_norm else None

    def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot_BSHK, score_BSHK = self.best(x_BSD)
        weight_BSHK = jax.nn.softmax(score_BSHK) if self.config.weights == "softmax" else jax.nn.relu(score_BSHK)
        flat = (*slot_BSHK.shape[:2], -1)
        return slot_BSHK.reshape(flat), weight_BSHK.reshape(flat)

    def best(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(slot int32, score float32), both [B, S, H, K] by falling score; of equal scores no order is promised."""
        B, S, _ = x_BSD.shape
        n, H, K = self.config.num_keys, self.config.num_heads, self.config.num_selected
        query = jnp.einsum("bsd,dhq->bshq", x_BSD.astype(jnp.float32), self.w_query[...], precision=EXACT)
        query = query if self.query_norm is None else self.query_norm(query)
        half = jnp.einsum("bshcq,chnq->cbshn", query.reshape(B, S, H, 2, -1), self.keys[...], precision=EXACT)
        first, first_score = _best(half[0], min(K, n))
        second, second_score = _best(half[1], min(K, n))
        sums = first_score[..., :, None] + second_score[..., None, :]
        pair, score_BSHK = _best(sums.reshape(B, S, H, -1), K)
        row = jnp.take_along_axis(first, pair // second.shape[-1], axis=-1)
        column = jnp.take_along_axis(second, pair % second.shape[-1], axis=-1)
        return row * n + column, score_BSHK


def _best(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(int32 index of the `count` highest of the last dimension, their scores); the indices survive remat."""
    index = checkpoint_name(highest(jax.lax.stop_gradient(scores), count)[1], SAVED_NAME)
    return index, jnp.take_along_axis(scores, index, axis=-1)


def to_slices(x_BSD: jax.Array) -> jax.Array:
    """x as the devices need it that hold slices of rows: an all-to-all from sequences to widths."""
    x_BSD = constrain(x_BSD, "batch", "stream", None)
    return constrain(constrain(x_BSD, "memory_batch", "memory_position", "memory_slice"), *SLICED)


def from_slices(y_BSD: jax.Array) -> jax.Array:
    """The inverse: cut like the batch again."""
    y_BSD = constrain(constrain(y_BSD, *SLICED), "memory_batch", "memory_position", "memory_slice")
    return constrain(y_BSD, "batch", "stream", None)


def rows(table: nnx.Param, slot_BSR: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, S, R, D] in `dtype`: the rows of float32 `table` [slots, D] that R lookups name.

    Rows are cast after they are gathered, so that neither the table nor its gradient is ever copied in `dtype`. What
    it costs: R D numbers a token where XLA does not fuse the gather with the sum that follows.
    """
    slot_BSR = constrain(slot_BSR, "memory_batch", "memory_position", None)
    return table[...].at[slot_BSR].get(mode="promise_in_bounds").astype(dtype)


def weighted_sum(weight_BSR: jax.Array, rows_BSRD: jax.Array) -> jax.Array:
    """sum_r weight_r row_r: [B, S, D] in the dtype of the rows, summed in float32, cut like the batch again."""
    weight_BSR = constrain(weight_BSR, "memory_batch", "memory_position", None)
    y_BSD = jnp.einsum(
        "bsr,bsrd->bsd", weight_BSR.astype(rows_BSRD.dtype), rows_BSRD, preferred_element_type=jnp.float32
    )
    return from_slices(y_BSD.astype(rows_BSRD.dtype))
