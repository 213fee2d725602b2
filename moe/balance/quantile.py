"""Quantile balancing: the bias that would have given every expert its even share of the batch, taken in one move.

    d_te = cutoff_t - s_te                 what expert e lacked to be taken by token t (`moe.balance.shortfall`)
    move_e = the K / E quantile of d_te over the real tokens of the whole batch
    bias <- memory bias + (1 - memory) (bias + move);  then bias -= mean(bias)

With bias + move_e in place of its bias, and the cutoffs as they were, an expert would be taken by K / E of the tokens.
K / E is read off the batch (assignments / tokens / E). The quantile is interpolated inside a bin of a fixed histogram
over [-reach, reach]; a move never goes beyond. Tokens are counted in integers, so the bias depends on a cut of the
batch by the rounding of the interpolation and of the mean alone, unless the rounding of a score carries a token over
the edge of the very bin the quantile is in.

State: float32 [L, E], checkpointed. No gradient, no loss term. Cost: tokens * E * bins comparisons a layer and a sum of
E (bins + 1) counts over the devices. Raises for routers that do not select by scores.
Source: from public descriptions, not verified against a paper: NVIDIA/Megatron-LM pull requests 5349 and 6638 and
pytorch/torchtitan pull request 4577, which follow the Kimi K3 report (section 2.3.3, eq. 13-14) and kexue.fm/11619.
Differs from the paper: as described there, the histogram is of cutoff - (score without bias), over a range that follows
the bias; ours is of what is lacking, over a fixed range, so it needs no state beside the bias. The scores may be
softmax or sigmoid. `memory` is Megatron's moving average.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe.balance.base import BalanceRule, State
from moe.balance.shortfall import edges
from moe.balance.statistics import Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantileConfig(BalanceRule):
    """Bias by the quantile of what experts lack."""

    moves_bias: ClassVar[bool] = True

    name: str = "quantile"
    """Name in the log."""
    memory: float = 0.0
    """Share of the old bias that is kept in an update; 0: the bias of the last batch alone."""
    reach: float = 1.0
    """Largest move of a step, and range of the histogram, in units of the selection scores."""
    bins: int = 1001
    """Bins of the histogram; odd, so that a balanced expert, which lacks nothing, is in the middle of one."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.coefficient != 0:
            yield "coefficient", "must be 0: quantile balancing has no loss term"
        if not 0 <= self.memory < 1:
            yield "memory", "must be at least 0 and less than 1"
        if not self.reach > 0:
            yield "reach", "must be greater than 0"
        if self.bins < 3 or self.bins % 2 == 0:
            yield "bins", "must be odd and at least 3"

    def asks(self) -> dict[str, Any]:
        return {"shortfall": (self.reach, self.bins)}

    def init_state(self, exists_LE: np.ndarray) -> State:
        return {"bias": jnp.zeros(exists_LE.shape, jnp.float32)}

    def update(self, state: State, whole: Statistics) -> State:
        if whole.below_EH is None:
            raise ValueError(f"balance rule {self.name!r}: a layer with experts counts no missing scores")
        below_LEH = whole.below_EH.sum(axis=0)
        E_L, exists_LE = whole.num_experts_L, whole.exists_LE
        share_L = whole.count_BE.sum(axis=(0, 2, 3)).astype(jnp.float32) / E_L
        move_LE = _quantile(below_LEH, share_L, edges(self.reach, self.bins))
        old_LE = state["bias"]
        new_LE = jnp.where(exists_LE, old_LE + (1.0 - self.memory) * move_LE, 0.0)
        new_LE = jnp.where(exists_LE, new_LE - new_LE.sum(axis=1, keepdims=True) / E_L[:, None], 0.0)
        return {"bias": jnp.where(share_L[:, None] > 0, new_LE, old_LE)}


def _quantile(below_LEH: jax.Array, share_L: jax.Array, edge_H: np.ndarray) -> jax.Array:
    """float32 [L, E]: where the count of tokens below reaches the even share, linear inside a bin."""
    share_LE1 = jnp.broadcast_to(share_L[:, None, None], (*below_LEH.shape[:2], 1))
    count_LEH = below_LEH.astype(jnp.float32)
    upper_LE1 = jnp.clip((count_LEH < share_LE1).sum(axis=-1, keepdims=True), 1, edge_H.shape[0] - 1)
    low_LE1, high_LE1 = (jnp.take_along_axis(count_LEH, at, axis=-1) for at in (upper_LE1 - 1, upper_LE1))
    part_LE1 = jnp.clip((share_LE1 - low_LE1) / jnp.maximum(high_LE1 - low_LE1, 1.0), 0.0, 1.0)
    edge = jnp.asarray(edge_H)
    return (edge[upper_LE1 - 1] + part_LE1 * (edge[upper_LE1] - edge[upper_LE1 - 1]))[..., 0]
