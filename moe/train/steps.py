"""The compiled step of a run; with a ladder of capacities, one for every rung that is climbed."""

from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from moe.models import Decoder
from moe.train.ladder import Ladder, at_capacity
from moe.train.loss import Arrays
from moe.train.run import RunConfig
from moe.train.state import TrainState
from moe.train.step import jit_step
from moe.train.step_metrics import NEED, Metrics


class Steps:
    """Runs step after step, each with the capacity that the needs of earlier ones ask for."""

    def __init__(
        self, config: RunConfig, model: Decoder, tx: optax.GradientTransformation, mesh: Mesh, shardings: TrainState
    ):
        self._config, self._model, self._rest = config, model, (tx, mesh, shardings)
        self._ladder = Ladder(config.ladder) if config.ladder is not None else None
        self._compiled: dict[float | None, Any] = {}
        self._capacities: dict[int, float] = {}
        self.compiles: Callable[[int], None] = lambda number: None
        """Is told a step's number before its program is compiled."""

    def __call__(self, number: int, state: TrainState, arrays: Arrays) -> tuple[TrainState, Metrics]:
        """Step `number` of the run, counted from 1."""
        capacity = None if self._ladder is None else self._ladder.capacity(number)
        if capacity is not None:
            self._capacities[number] = capacity
        if capacity not in self._compiled:
            self.compiles(number)
            self._compiled[capacity] = self._compile(capacity)
        found: tuple[TrainState, Metrics] = self._compiled[capacity](state, arrays)
        return found

    def observe(self, values: dict[str, Any]) -> dict[str, Any]:
        """Takes note of a step's values, once each is on the host; returns them, with the capacity it ran with."""
        if self._ladder is None:
            return values
        self._ladder.observe(values["step"], max(values[NEED]))
        return values | {"dispatch/capacity": self._capacities.pop(values["step"])}

    def get_state(self) -> dict[str, Any]:
        """JSON data for the checkpoint; every step so far must have been observed."""
        return {} if self._ladder is None else {"ladder": self._ladder.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the state of a checkpoint; `{}`: to the start of the run."""
        self._capacities = {}
        if self._config.ladder is None:
            return
        self._ladder = Ladder(self._config.ladder)
        if "ladder" in state:
            self._ladder.set_state(state["ladder"])

    def _compile(self, capacity: float | None) -> Any:
        model = self._model
        if capacity is not None:
            model = at_capacity(self._config.model, capacity).abstract()
        return jit_step(self._config, model, *self._rest)
