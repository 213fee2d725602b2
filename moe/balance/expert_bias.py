"""Loss-free balancing: a bias per expert, added to the selection scores, moved once per optimizer step.

    move_gi = sign(1/E - f_gi)  or  E (1/E - f_gi)         for each group g of the scope
    bias_i += rate * sum_g (n_g / n) move_gi               n_g real tokens of group g;  then bias -= mean(bias) if asked

One bias and one update a step, whatever the scope: the token-weighted mean of the groups' moves. The sign rule counts
in integers and steps by `rate` to 6 digits, so the bias is bit-equal however the batch was cut (re-centred: up to the
rounding of the mean). The bias never enters a combine weight; no gradient.

State: float32 [L, E], checkpointed, the effective value (evaluation and export read the same).
Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1; DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
Differs from the paper: scopes other than global, the re-centring and the proportional rule are options of ours; the
counts are those of the whole optimizer step.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe.balance.base import BalanceRule, State
from moe.balance.scope import Scope, group_problems, group_size, in_order, pool, scope_problems
from moe.balance.statistics import Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBiasConfig(BalanceRule):
    """Loss-free expert bias."""

    moves_bias: ClassVar[bool] = True

    name: str = "expert_bias"
    """Name in the log."""
    rate: float = 1e-3
    """How far the bias moves in a step."""
    rule: Literal["sign", "proportional"] = "sign"
    """Move by the sign of the deviation from the mean load, or by the deviation itself (in units of the mean load)."""
    recentre: bool = False
    """Subtract the mean after each update."""
    scope: Scope = "global"
    """Where the load is counted: 'global', 'sequence', or a number n of consecutive sequences."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.rate > 0:
            yield "rate", "must be greater than 0"
        if self.coefficient != 0:
            yield "coefficient", "must be 0: the expert bias has no loss term; `rate` is its knob"
        yield from scope_problems("scope", self.scope)

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        yield from group_problems("scope", self.scope, num_microbatches * batch_size)

    def init_state(self, exists_LE: np.ndarray) -> State:
        return {"bias": jnp.zeros(exists_LE.shape, jnp.float32)}

    def update(self, state: State, whole: Statistics) -> State:
        count_LXE = in_order(whole.count_BE)
        L, X, E = count_LXE.shape
        E_L, exists_LE = whole.num_experts_L, whole.exists_LE
        n = group_size(self.scope, X)
        tokens_LG = in_order(whole.tokens_B[..., None])[..., 0].reshape(L, X // n, n).sum(axis=2)
        total_L1 = jnp.maximum(tokens_LG.sum(axis=1), 1)[:, None].astype(jnp.float32)
        if self.rule == "sign":
            count_LGE = count_LXE.reshape(L, X // n, n, E).sum(axis=2)
            moves_LE = (_sign(count_LGE, E_L.astype(jnp.int32)) * tokens_LG[..., None]).sum(axis=1)
        else:
            moves_LE = ((1.0 - E_L[:, None, None] * pool(count_LXE, n)) * tokens_LG[..., None]).sum(axis=1)
        # XLA may divide by a reciprocal, regroup the product, and fuse it with the sum; each rounds differently.
        # Rounding share and step to fewer bits undoes the first two and forbids the third.
        share_LE = jax.lax.reduce_precision(moves_LE.astype(jnp.float32) / total_L1, 8, 15)
        bias_LE = state["bias"] + jax.lax.reduce_precision(self.rate * share_LE, 8, 20)
        bias_LE = jnp.where(exists_LE, bias_LE, 0.0)
        if self.recentre:
            bias_LE = jnp.where(exists_LE, bias_LE - bias_LE.sum(axis=1, keepdims=True) / E_L[:, None], 0.0)
        return {"bias": bias_LE}


def _sign(count_LGE: jax.Array, num_experts_L: jax.Array) -> jax.Array:
    """int32 sign(mean - count) per expert, in integers: XLA may take a reciprocal, and then c / sum(c) is not 1 / E."""
    mean_LG1, rest_LG1 = jnp.divmod(count_LGE.sum(axis=-1, keepdims=True), num_experts_L[:, None, None])
    below = (count_LGE < mean_LG1) | ((count_LGE == mean_LG1) & (rest_LG1 > 0))
    return below.astype(jnp.int32) - (count_LGE > mean_LG1)


def selection_bias(rules: Sequence[BalanceRule], states: dict[str, State], exists_LE: np.ndarray) -> jax.Array:
    """float32 [L, E] added to the selection scores: the sum of the rules' biases, zeros if there is none."""
    total = jnp.zeros(exists_LE.shape, jnp.float32)
    for rule in rules:
        total = total + states[rule.name].get("bias", 0.0)
    return total
