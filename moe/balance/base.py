"""The balance contract: a rule reads statistics, adds a term to the loss and may keep state.

The train step runs a global batch as A micro-batches of B sequences. For each rule it

    1. asks `needs_prepass`, and if so gathers the statistics of the whole batch in a pass without gradient;
    2. calls `term` on every micro-batch: its values, summed over the micro-batches, are the term of the batch;
    3. calls `update` once, with the statistics of the whole batch, after the optimizer.

Stacked statistics have shapes [A, L, B, ...]; those of a micro-batch [L, B, ...]. L counts MoE layers. Layers may have
different numbers of experts: arrays are as wide as the widest, and a rule takes E from `Statistics.num_experts_L`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from moe.balance.statistics import Statistics

State = dict[str, jax.Array]


class Batch(NamedTuple):
    """What a rule is told about the whole batch while it looks at one micro-batch."""

    microbatch: jax.Array
    """int32 a, the micro-batch at hand."""
    num_microbatches: int
    """A."""
    num_tokens: jax.Array
    """float32 real tokens in the whole batch."""
    statistics: Statistics | None
    """Of the whole batch [A, L, B, ...] without gradient, where some rule asked for the pre-pass; else None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceRule:
    """Base of every balance rule. Losses are summed over layers; `coefficient` is stated per layer."""

    name: str = "rule"
    """Name in the log and of the checkpointed state; unique among the rules of a run."""
    coefficient: float = 0.0
    """Weight of the term in the loss, per layer; a rule without a loss term must leave it at 0."""

    def needs_prepass(self, num_microbatches: int, batch_size: int) -> bool:
        return False

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        """Problems that show only once the batch layout (A, B) is known."""
        yield from ()

    def init_state(self, exists_LE: np.ndarray) -> State:
        """Checkpointed state at step 0; `exists_LE` is False for experts that a narrower layer does not have."""
        return {}

    def init_carry(self, exists_LE: np.ndarray) -> Any:
        """What is carried from one micro-batch to the next, and forgotten after the step."""
        return ()

    def term(self, micro: Statistics, batch: Batch, carry: Any, state: State) -> tuple[jax.Array | None, Any, Any]:
        """(value_L before the coefficient or None, next carry, record); the records of a step go to `report`."""
        return None, carry, ()

    def update(self, state: State, whole: Statistics) -> State:
        """State after the optimizer step, from the statistics of the whole batch."""
        return state

    def report(self, records: Any, whole: Statistics) -> dict[str, jax.Array]:
        """Extra numbers for the log, from the stacked records [A, ...] and the statistics of the whole batch."""
        return {}
