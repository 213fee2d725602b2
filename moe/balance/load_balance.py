"""The load-balance loss, with the scope of the load as one field.

For one layer, groups g of sequences (see `moe.balance.scope`), n_g real tokens in group g and n in all:

    f_g = c_g / sum(c_g)                      fraction of group g's assignments per expert; no gradient
    P_g = (1 / n_g) sum_{t in g} p_t          mean probability over group g's real tokens; carries gradient
    loss = sum_g (n_g / n) E sum_i f_gi P_gi  = (E / n) sum_b sum_i f_{g(b) i} S_bi

with S_b the probability sum of sequence b: all that is needed from the forward pass is per sequence. The loss is 1 at
perfect balance for any K and any E. For the gradient, d loss / d z_tm = (E / n) p_tm (f_m - sum_i f_i p_ti).

`expert_groups` = M: balance between M runs of consecutive experts, as they lie on M devices, and not inside of one:
f_gi is replaced by its mean over the run of i, so loss = sum_g (n_g / n) M sum_m f_gm P_gm with sums over the run.

With `scope="global"` and A > 1 micro-batches, f over the whole batch is not known while a micro-batch runs:
    `exact`   counts it in a pass without gradient first: one more forward. Does not depend on A or on the order.
    `buffer`  uses the counts of micro-batches 0..a: free, as in the paper, depends on A and on the order; the log
              says by how much (`balance/<name>/load_error`, mean over micro-batches of sum_i |f_used - f|).
    `lagged`  uses last step's f (checkpointed, uniform at step 0): free, another, stale loss, does not depend on A.
A group that spans micro-batches is counted in the same pre-pass as `exact`. With A = 1 `exact` and `buffer` are the
same and cost nothing. With `scope_after` the pre-pass is paid on both sides of the switch if either side needs it.

A small sequence-level term beside a global one, as in the paper, is two rules in the list.

Collectives: the reduction of [L, E] counts over the batch axes, placed by XLA.
Source: Qiu et al. 2025, "Demons in the Detail" (arXiv 2501.11873), eq. 2-6 and algorithm 1; Fedus et al. 2021, eq. 4;
Dai et al. 2024, DeepSeekMoE (arXiv 2401.06066), eq. 15-17, for the loss between devices (from memory, not verified).
Differs from the paper: f is normalised to sum to 1 (the paper leaves open 1 or K), groups are weighted by their real
tokens (the paper's groups are equal), and `exact` and `lagged` are ours.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

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

    depends_on_order: ClassVar[bool] = True  # accumulation="buffer" alone

    name: str = "load_balance"
    """Name in the log."""
    coefficient: float = 0.01
    """Weight in the loss, per layer."""
    scope: Scope = "global"
    """Where the load is counted: 'global', 'sequence', or a number n of consecutive sequences."""
    accumulation: Literal["exact", "buffer", "lagged"] = "exact"
    """How scope='global' gets the load when the batch is accumulated."""
    expert_groups: int = 0
    """Balance between so many equal runs of consecutive experts, instead of between experts; 0: between experts."""
    scope_after: Scope | None = None
    """The scope from step `switch_step` on; None: `scope` throughout."""
    switch_step: int = 0
    """Steps taken with `scope` before `scope_after`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, coefficient=0, switch_step=0)
        yield from scope_problems("scope", self.scope)
        if self.expert_groups < 0 or self.expert_groups == 1:
            yield "expert_groups", "must be 0 or at least 2"
        if "global" not in self._scopes and self.accumulation != "exact":
            yield "accumulation", f"is ignored with scope={self.scope!r}; leave it at 'exact' or use scope='global'"
        if self.scope_after is not None:
            yield from scope_problems("scope_after", self.scope_after)
            if self.switch_step < 1:
                yield "switch_step", "must be at least 1: `scope` would never be used"
            if self.scope_after == self.scope:
                yield "scope_after", "must differ from scope"
        elif self.switch_step:
            yield "switch_step", "is ignored without scope_after"

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        for field, scope in zip(("scope", "scope_after"), self._scopes, strict=False):
            yield from group_problems(field, scope, num_microbatches * batch_size)

    def model_problems(self, exists_LE: np.ndarray) -> Iterator[tuple[str, str]]:
        for E in sorted(set(exists_LE.sum(axis=1).tolist())):
            if self.expert_groups and (E % self.expert_groups or self.expert_groups == E):
                yield "expert_groups", f"must divide, and be less than, the {E} experts of a layer"

    def needs_prepass(self, num_microbatches: int, batch_size: int) -> bool:
        return self.weighs and any(self._spans(scope, num_microbatches, batch_size) for scope in self._scopes)

    def init_state(self, exists_LE: np.ndarray) -> State:
        return {"load": load(jnp.asarray(exists_LE, jnp.int32))} if self.accumulation == "lagged" else {}

    def init_carry(self, exists_LE: np.ndarray) -> Any:
        return jnp.zeros(exists_LE.shape, jnp.int32) if self.accumulation == "buffer" else ()

    def term(self, micro: Statistics, batch: Batch, carry: Any, state: State) -> tuple[jax.Array | None, Any, Any]:
        A, B = batch.num_microbatches, micro.count_BE.shape[1]
        record: Any = ()
        if self.accumulation == "lagged":
            record = state["load"]
        elif self.accumulation == "buffer":
            carry = carry + micro.count_BE.sum(axis=1)
            record = load(carry)
        if not self.weighs and any(self._spans(scope, A, B) for scope in self._scopes):
            return None, carry, batch.step if self.accumulation == "exact" else record
        loads = [self._load(scope, micro, batch, record) for scope in self._scopes]
        f_LBE = jax.lax.stop_gradient(self._at(batch.step, loads))
        return _value(self._between_groups(f_LBE, micro), micro.prob_BE, micro, batch.num_tokens), carry, record

    def update(self, state: State, whole: Statistics) -> State:
        return {"load": load(whole.count_BE.sum(axis=(0, 2)))} if self.accumulation == "lagged" else state

    def report(self, records: Any, whole: Statistics) -> dict[str, jax.Array]:
        A, B = whole.count_BE.shape[0], whole.count_BE.shape[2]
        if self.accumulation != "exact":
            f_LE = load(whole.count_BE.sum(axis=(0, 2)))
            return {f"balance/{self.name}/load_error": jnp.abs(records - f_LE).sum(axis=-1).mean(axis=0)}
        if self.weighs or not any(self._spans(scope, A, B) for scope in self._scopes):
            return {}
        count_LXE, total = in_order(whole.count_BE), jnp.maximum(whole.tokens_B[:, 0].sum(), 1)
        loads = [per_sequence_load(count_LXE, group_size(scope, A * B)) for scope in self._scopes]
        f_LXE = self._between_groups(self._at(jnp.ravel(records)[0], loads), whole)
        return {f"balance/{self.name}": _value(f_LXE, in_order(whole.prob_BE), whole, total)}

    @property
    def _scopes(self) -> tuple[Scope, ...]:
        return (self.scope,) if self.scope_after is None else (self.scope, self.scope_after)

    def _at(self, step: jax.Array | int, loads: list[jax.Array]) -> jax.Array:
        """The load of the scope that holds at this step."""
        return loads[0] if len(loads) == 1 else jnp.where(step < self.switch_step, loads[0], loads[1])

    def _spans(self, scope: Scope, A: int, B: int) -> bool:
        """Whether the load of a sequence's group takes more than one micro-batch to count."""
        if A == 1 or (scope == "global" and self.accumulation != "exact"):
            return False
        return B % group_size(scope, A * B) != 0

    def _load(self, scope: Scope, micro: Statistics, batch: Batch, record: Any) -> jax.Array:
        """[L, B, E] the load that each sequence of a micro-batch is held against."""
        A, B = batch.num_microbatches, micro.count_BE.shape[1]
        if scope == "global" and self.accumulation != "exact":
            return jnp.broadcast_to(record[:, None, :], micro.count_BE.shape)
        if not self._spans(scope, A, B):
            return per_sequence_load(micro.count_BE, group_size(scope, A * B))
        assert batch.statistics is not None
        f_LXE = per_sequence_load(in_order(batch.statistics.count_BE), group_size(scope, A * B))
        return jax.lax.dynamic_slice_in_dim(f_LXE, batch.microbatch * B, B, axis=1)

    def _between_groups(self, f_LBE: jax.Array, stats: Statistics) -> jax.Array:
        """f replaced by its mean over each expert's group."""
        if not self.expert_groups:
            return f_LBE
        L, E = f_LBE.shape[0], f_LBE.shape[-1]
        E_L = np.array(stats.widths or (E,) * L)[:, None]
        # The runs of a narrower layer are shorter; experts that it does not have are in no run.
        group_LE = np.where(np.arange(E) < E_L, np.arange(E) * self.expert_groups // E_L, -1)
        same_LEE = (group_LE[:, :, None] == group_LE[:, None, :]) & (group_LE[:, :, None] >= 0)
        mean_LEE = same_LEE * (self.expert_groups / E_L[:, :, None])
        return jnp.einsum("lbe,lef->lbf", f_LBE, mean_LEE.astype(np.float32), precision=jax.lax.Precision.HIGHEST)


def _value(f_LBE: jax.Array, prob_LBE: jax.Array, stats: Statistics, num_tokens: jax.Array) -> jax.Array:
    """[L] (E / n) sum_b sum_i f_bi S_bi."""
    return stats.num_experts_L * (f_LBE * prob_LBE).sum(axis=(1, 2)) / num_tokens
