"""Rules that are a function of mean probabilities, and not a linear one: what entropy and importance share.

    value = sum_g (n_g / n) h(P_g)        P_g the mean probability over the real tokens of group g of the scope

The mean over a group that spans micro-batches is not known while one of them runs, and h of a part is not a part of h:
the statistics come from a pass without gradient first (one more forward), every micro-batch back-propagates the
derivative of the value at the whole batch's statistics, and the shares of the micro-batches add up to the value:

    share of a micro-batch = value(whole) / A + sum_bi d value / d S_bi (whole) * (S_bi - stopped S_bi)

with S_b the probability sum of sequence b. Groups inside a micro-batch are differentiated as they are. Does not depend
on A or on the order of the micro-batches. Collectives: sums of [L, E] over the batch axes, placed by XLA.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe.balance.base import BalanceRule, Batch, State
from moe.balance.scope import Scope, group_problems, group_size, in_order, scope_problems
from moe.balance.statistics import Statistics
from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanProbabilityRule(BalanceRule):
    """Base of rules that define `of_mean`."""

    scope: Scope = "global"
    """Over what the mean is taken: 'global', 'sequence', or a number n of consecutive sequences."""

    def of_mean(self, prob_LGE: jax.Array, num_experts_L: jax.Array) -> jax.Array:
        """h [L, G] of mean probabilities; finite, and with a finite gradient, where they are 0."""
        raise NotImplementedError(f"{type(self).__name__} must define of_mean")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, coefficient=0)
        yield from scope_problems("scope", self.scope)

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        yield from group_problems("scope", self.scope, num_microbatches * batch_size)

    def needs_prepass(self, num_microbatches: int, batch_size: int) -> bool:
        return self.weighs and self._spans(num_microbatches, batch_size)

    def term(self, micro: Statistics, batch: Batch, carry: Any, state: State) -> tuple[jax.Array | None, Any, Any]:
        A, B = batch.num_microbatches, micro.count_BE.shape[1]
        E_L = micro.num_experts_L
        if not self._spans(A, B):
            return self._value(micro.prob_BE, micro.tokens_B, batch.num_tokens, E_L), carry, ()
        if not self.weighs:
            return None, carry, ()
        assert batch.statistics is not None
        prob_LXE, tokens_LX = _whole(batch.statistics)

        def total(prob: jax.Array) -> tuple[jax.Array, jax.Array]:
            value_L = self._value(prob, tokens_LX, batch.num_tokens, E_L)
            return value_L.sum(), value_L

        slope_LXE, value_L = jax.grad(total, has_aux=True)(prob_LXE)
        slope_LBE = jax.lax.dynamic_slice_in_dim(slope_LXE, batch.microbatch * B, B, axis=1)
        moved_LBE = micro.prob_BE - jax.lax.stop_gradient(micro.prob_BE)
        return value_L / A + (slope_LBE * moved_LBE).sum(axis=(1, 2)), carry, ()

    def report(self, records: Any, whole: Statistics) -> dict[str, jax.Array]:
        A, B = whole.count_BE.shape[0], whole.count_BE.shape[2]
        if self.weighs or not self._spans(A, B):
            return {}
        prob_LXE, tokens_LX = _whole(whole)
        total = jnp.maximum(tokens_LX[0].sum(), 1).astype(jnp.float32)
        return {f"balance/{self.name}": self._value(prob_LXE, tokens_LX, total, whole.num_experts_L)}

    def _spans(self, A: int, B: int) -> bool:
        return A > 1 and B % group_size(self.scope, A * B) != 0

    def _value(self, prob_LXE: jax.Array, tokens_LX: jax.Array, total: jax.Array, E_L: jax.Array) -> jax.Array:
        L, X, E = prob_LXE.shape
        # "global" over what is at hand: this is called with less than the batch only for groups inside a micro-batch.
        n = group_size(self.scope, X)
        tokens_LG = tokens_LX.reshape(L, X // n, n).sum(axis=2).astype(jnp.float32)
        prob_LGE = prob_LXE.reshape(L, X // n, n, E).sum(axis=2) / jnp.maximum(tokens_LG, 1.0)[..., None]
        return (tokens_LG / total * self.of_mean(prob_LGE, E_L)).sum(axis=1)


def _whole(whole: Statistics) -> tuple[jax.Array, jax.Array]:
    """(probability sums [L, X, E], real tokens [L, X]) of the sequences of the whole batch, without gradient."""
    stopped = jax.lax.stop_gradient(whole.prob_BE)
    return in_order(stopped), in_order(whole.tokens_B[..., None])[..., 0]
