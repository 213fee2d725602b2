"""Router z-loss: keeps router logits small.

    loss = (1 / n) sum_t logsumexp(z_t)^2          over the n real tokens of the whole batch, per layer

Carries gradient to the logits; needs no statistics but the sum. Collectives: none of its own.
Source: Zoph et al. 2022, ST-MoE (arXiv 2202.08906), eq. 5. Differs from the paper: no difference known.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from moe.balance.base import BalanceRule, Batch, State
from moe.balance.statistics import Statistics
from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLossConfig(BalanceRule):
    """Mean squared logsumexp of the router logits."""

    name: str = "z"
    """Name in the log."""
    coefficient: float = 1e-3
    """Weight in the loss, per layer."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, coefficient=0)

    def term(self, micro: Statistics, batch: Batch, carry: Any, state: State) -> tuple[jax.Array, Any, Any]:
        return micro.z_B.sum(axis=1) / batch.num_tokens, carry, ()
