"""The load-balance loss, with the scope of the load as one field.

For one layer, groups g of sequences (see `moe.balance.scope`), n_g real tokens in group g and n in all:

    f_g = c_g / sum(c_g)                      fraction of group g's assignments per expert; no gradient
    P_g = (1 / n_g) sum_{t in g} p_t          mean probability over group g's real tokens; carries gradient
    loss = sum_g (n_g / n) E sum_i f_gi P_gi  = (E / n) sum_b sum_i f_{g(b) i} S_bi

with S_b the probability sum of sequence b: all that is needed from the forward pass is per sequence. The loss is 1 at
perfect balance for any K and any E. For the gradient, d loss / d z_tm = (E / n) p_tm (f_m - sum_i f_i p_ti).

With `scope="global"` and A > 1 micro-batches, f over the whole batch is not known while a micro-batch runs:
    `exact`   counts it in a pass without gradient first: one more forward. Does not depend on A or on the order.
    `buffer`  uses the counts of micro-batches 0..a: free, as in the paper, depends on A and on the order; the log
              says by how much (`balance/<name>/load_error`, mean over micro-batches of sum_i |f_used - f|).
    `lagged`  uses last step's f (checkpointed, uniform at step 0): free, another, stale loss, does not depend on A.
A group that spans micro-batches is counted in the same pre-pass as `exact`. With A = 1 `exact` and `buffer` are the
same and cost nothing.

Collectives: the reduction of [L, E] counts over the batch axes, placed by XLA.
Source: Qiu et al. 2025, "Demons in the Detail" (arXiv 2501.11873), eq. 2-6 and algorithm 1; Fedus et al. 2021, eq. 4.
Differs from the paper: f is normalised to sum to 1 (the paper leaves open 1 or K), groups are weighted by their real
tokens (the paper's groups are equal), and `exact` and `lagged` are ours.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe.balance.base import BalanceRule, Batch, State
from moe.balance.scope import Scope, group_problems, group_size, in_order, per_sequence_load, scope_problems
from moe.balance.statistics import Statistics, load
from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadBalanceConfig(BalanceRule):
    """E * sum_i f_i P_i, 1 at perfect balance."""

    name: str = "load_balance"
    """Name in the log."""
    coefficient: float = 0.01
    """Weight in the loss, per layer."""
    scope: Scope = "global"
    """Where the load is counted: 'global', 'sequence', or a number n of consecutive sequences."""
    accumulation: Literal["exact", "buffer", "lagged"] = "exact"
    """How scope='global' gets the load when the batch is accumulated."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, coefficient=0)
        yield from scope_problems("scope", self.scope)
        if self.scope != "global" and self.accumulation != "exact":
            yield "accumulation", f"is ignored with scope={self.scope!r}; leave it at 'exact' or use scope='global'"

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        yield from group_problems("scope", self.scope, num_microbatches * batch_size)

    def needs_prepass(self, num_microbatches: int, batch_size: int) -> bool:
        if num_microbatches == 1 or self.accumulation != "exact":
            return False
        return batch_size % group_size(self.scope, num_microbatches * batch_size) != 0

    def init_state(self, exists_LE: np.ndarray) -> State:
        return {"load": load(jnp.asarray(exists_LE, jnp.int32))} if self.accumulation == "lagged" else {}

    def init_carry(self, exists_LE: np.ndarray) -> Any:
        return jnp.zeros(exists_LE.shape, jnp.int32) if self.accumulation == "buffer" else ()

    def term(self, micro: Statistics, batch: Batch, carry: Any, state: State) -> tuple[jax.Array, Any, Any]:
        count_LBE = micro.count_BE
        B = count_LBE.shape[1]
        record: Any = ()
        if self.accumulation == "lagged":
            record = state["load"]
            f_LBE = record[:, None, :]
        elif self.accumulation == "buffer":
            carry = carry + count_LBE.sum(axis=1)
            record = load(carry)
            f_LBE = record[:, None, :]
        elif self.needs_prepass(batch.num_microbatches, B):
            assert batch.statistics is not None
            f_LBE = self._slice(batch.statistics.count_BE, batch.microbatch)
        else:
            f_LBE = per_sequence_load(count_LBE, group_size(self.scope, batch.num_microbatches * B))
        f_LBE = jax.lax.stop_gradient(f_LBE)
        value_L = micro.num_experts_L * (f_LBE * micro.prob_BE).sum(axis=(1, 2)) / batch.num_tokens
        return value_L, carry, record

    def update(self, state: State, whole: Statistics) -> State:
        return {"load": load(whole.count_BE.sum(axis=(0, 2)))} if self.accumulation == "lagged" else state

    def report(self, records: Any, whole: Statistics) -> dict[str, jax.Array]:
        if self.accumulation == "exact":
            return {}
        f_LE = load(whole.count_BE.sum(axis=(0, 2)))
        return {f"balance/{self.name}/load_error": jnp.abs(records - f_LE).sum(axis=-1).mean(axis=0)}

    def _slice(self, count_ALBE: jax.Array, index: jax.Array) -> jax.Array:
        """Micro-batch `index`'s share of the load of every group of the whole batch."""
        A, L, B, E = count_ALBE.shape
        f_LABE = per_sequence_load(in_order(count_ALBE), group_size(self.scope, A * B)).reshape(L, A, B, E)
        return jax.lax.dynamic_index_in_dim(f_LABE, index, axis=1, keepdims=False)
