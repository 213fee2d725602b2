"""Dynamic capacity: buffers as large as the load needs, out of a short ladder of sizes, one compiled step for each.

A step reports `dispatch/need`: by what multiple of the balanced load the fullest buffer of each layer would have had to
be sized for nothing to be dropped. Let need_n be the largest over the layers at step n, and h the headroom.

    up     at once: to the lowest rung >= h need_n, if the present one is below it
    down   when for `dwell` steps in a row lower rungs would have done: to the highest of those that would

Up at once and down slowly is the hysteresis: a load that swings about a border settles on the upper rung. The decision
for step n reads needs up to step n - 2: those of n - 1 are still on the device when step n is dispatched, so no step
waits for a number. Needs are the same on every process (they are metrics of the whole batch), so all processes climb at
the same step without talking, and what has been seen is part of the checkpoint: a resumed run climbs where the
uninterrupted one does.

Wherever the rung is at least the need, nothing is dropped and the step's numbers do not depend on the rung.
Source: Kossmann et al. 2022, DynaMoE (arXiv 2205.01848), and the recompile example of FlexFlow. Differs from the paper:
a ladder of sizes instead of any size, one rung for all layers, a step late; cached assignments are not here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe.config import ConfigError, is_config
from moe.models import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Which sizes buffers may take, and how reluctantly they shrink."""

    rungs: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    """Multiples of the balanced load, rising; training starts on the last one."""
    headroom: float = 1.1
    """A rung does if it is at least this times the need."""
    dwell: int = 20
    """Steps in a row that a lower rung must have done before it is taken."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(self.rungs) < 2 or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] <= 0:
            yield "rungs", "must be at least two positive numbers, rising"
        if self.headroom < 1:
            yield "headroom", "must be at least 1"
        if self.dwell < 1:
            yield "dwell", "must be at least 1"


class Ladder:
    """The rung of every step, from the needs of the steps before it."""

    def __init__(self, config: LadderConfig):
        self._config = config
        self._rung = len(config.rungs) - 1
        self._enough: list[int] = []
        """For the latest steps, in each of which a lower rung would have done: the lowest that would."""
        self._waiting: list[tuple[int, float]] = []
        """Needs that no decision has read yet."""

    def observe(self, step: int, need: float) -> None:
        """Step `step` needed this multiple of the balanced load; steps come in order."""
        self._waiting.append((step, float(need)))

    def capacity(self, step: int) -> float:
        """The multiple of the balanced load that `step` runs with; to be asked once for every step, in order."""
        while self._waiting and self._waiting[0][0] <= step - 2:
            self._decide(self._waiting.pop(0)[1])
        return self._config.rungs[self._rung]

    def _decide(self, need: float) -> None:
        rungs = self._config.rungs
        enough = next((n for n, rung in enumerate(rungs) if rung >= self._config.headroom * need), len(rungs) - 1)
        if enough >= self._rung:
            self._rung, self._enough = enough, []
            return
        self._enough.append(enough)
        if len(self._enough) == self._config.dwell:
            self._rung, self._enough = max(self._enough), []

    def get_state(self) -> dict[str, Any]:
        """JSON data for the checkpoint."""
        return {
            "config": self._said(),
            "rung": self._rung,
            "enough": self._enough,
            "waiting": [list(pair) for pair in self._waiting],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """ConfigError for the state of another ladder: its rungs and what was counted towards them mean nothing here.

        States of before a ladder said which it is are taken as this one's: a workdir refuses another config anyway.
        """
        if state.get("config", self._said()) != self._said():
            was = ", ".join(f"{name} = {value}" for name, value in state["config"].items())
            raise ConfigError(f"ladder = {self._config}: the checkpoint was saved on another one ({was})")
        self._rung, self._enough = int(state["rung"]), [int(n) for n in state["enough"]]
        self._waiting = [(int(step), float(need)) for step, need in state["waiting"]]

    def _said(self) -> dict[str, Any]:
        """The config as JSON gives it back."""
        return dataclasses.asdict(self._config) | {"rungs": list(self._config.rungs)}


def at_capacity(model: DecoderConfig, capacity: float) -> DecoderConfig:
    """`model` with every buffer that has a size sized `capacity` times the balanced load; the same if none has one."""
    found: DecoderConfig = _resized(model, capacity)
    return found


def _resized(part: Any, capacity: float) -> Any:
    if isinstance(part, tuple):
        return tuple(_resized(one, capacity) for one in part)
    if not is_config(part):
        return part
    if (resized := getattr(part, "at_capacity", None)) is not None:
        return resized(capacity)
    changed = {
        field.name: new
        for field in dataclasses.fields(part)
        if (new := _resized(old := getattr(part, field.name), capacity)) != old
    }
    return dataclasses.replace(part, **changed) if changed else part
