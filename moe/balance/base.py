"""The balance contract: a rule reads statistics, adds a term to the loss and may keep state.

The train step runs a global batch as A micro-batches of B sequences. For each rule it

    1. asks `needs_prepass`, and if so gathers the statistics of the whole batch in a pass without gradient;
    2. calls `term` on every micro-batch: its values, summed over the micro-batches, are the term of the batch;
    3. calls `update` once, with the statistics of the whole batch, after the optimizer.

A rule with coefficient 0 reaches neither loss nor gradient and never asks for the pre-pass; what it would have been is
logged all the same, computed from the statistics that the step leaves behind.

Stacked statistics have shapes [A, L, B, ...]; those of a micro-batch [L, B, ...]. L counts MoE layers. Layers may have
different numbers of experts: arrays are as wide as the widest, and a rule takes E from `Statistics.num_experts_L`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

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
    step: jax.Array | int = 0
    """int32 optimizer steps taken before this one."""
    key: jax.Array | None = None
    """The run's random key; who draws from it folds in the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceRule:
    """Base of every balance rule. Losses are summed over layers; `coefficient` is stated per layer."""

    name: str = "rule"
    """Name in the log and of the checkpointed state; unique among the rules of a run."""
    coefficient: float = 0.0
    """Weight of the term in the loss, per layer; a rule without a loss term must leave it at 0."""

    moves_bias: ClassVar[bool] = False
    """Whether it acts through the state `bias` [L, E], which is added to the selection scores."""
    depends_on_order: ClassVar[bool] = False
    """Whether, for some value of its options, the term depends on the number and the order of the micro-batches."""

    @property
    def weighs(self) -> bool:
        """Whether the term reaches the loss; so does one whose coefficient is known only when the step runs."""
        return isinstance(self.coefficient, jax.Array) or self.coefficient != 0

    def asks(self) -> dict[str, Any]:
        """Static fields of the routing `Context` that make the layers keep more than the sums every rule can see."""
        return {}

    def needs_prepass(self, num_microbatches: int, batch_size: int) -> bool:
        return False

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        """Problems that show only once the batch layout (A, B) is known."""
        yield from ()

    def model_problems(self, exists_LE: np.ndarray) -> Iterator[tuple[str, str]]:
        """Problems that show only once the experts of every layer are known."""
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


def asked(rules: Sequence[BalanceRule]) -> dict[str, Any]:
    """What the rules together ask of the layers; raises ValueError where two ask for different things."""
    together: dict[str, Any] = {}
    for rule in rules:
        for name, value in rule.asks().items():
            if together.setdefault(name, value) != value:
                raise ValueError(f"balance rule {rule.name!r} asks for {name} = {value}, another for {together[name]}")
    return together
