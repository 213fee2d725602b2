"""A run in one workdir with poisoned data: chosen steps hold a token that the text does not have."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe.train.events import read_events
from moe.train.loop import Outcome, train
from moe.train.manifest import read
from moe.train.metrics import read_metrics
from moe.train.run import RollbackConfig, RunConfig
from moe.train.storage import CHECKPOINTS, whole_steps

POISON = 263


class Case:
    """One workdir, and what the loader gives for each step of the data (both counted from 1)."""

    def __init__(self, config: RunConfig, workdir: Path):
        self.config, self.workdir = config, workdir
        self.poisoned: set[int] = set()
        self.times: dict[int, int] = {}
        """For a step of the data that is poisoned only so many times: how often it still is."""
        self.left_out: Callable[[int], int] = lambda step: step
        """For the reference run: which step of the data comes in the place of which."""

    def run(self, times: int = 0, skip_data: bool = False, **more: Any) -> Outcome:
        config = dataclasses.replace(self.config, rollback=RollbackConfig(times=times, skip_data=skip_data))
        return train(config, self.workdir, **more)

    def item(self, real: Callable[[Any, int], dict[str, np.ndarray]], steps: Any, index: int) -> dict[str, np.ndarray]:
        number = self.left_out(index + 1)
        arrays = real(steps, number - 1)
        if number in self.poisoned or self.times.get(number, 0) > 0:
            self.times[number] = self.times.get(number, 0) - 1
            arrays["tokens"][0, 0, 1:] = POISON
        return arrays

    def curve(self) -> list[dict[str, Any]]:
        left = ("time/", "rollbacks", "data_step")
        records = read_metrics(self.workdir / "metrics.jsonl")
        return [{k: v for k, v in record.items() if not k.startswith(left)} for record in records]

    def column(self, name: str) -> list[Any]:
        return [record[name] for record in read_metrics(self.workdir / "metrics.jsonl")]

    def events(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in entry.items() if k != "time"} for entry in read_events(self.workdir)]

    def saved(self) -> dict[int, dict[str, Any]]:
        return {step: read(self.workdir / CHECKPOINTS / str(step)).data for step in whole_steps(self.workdir)}
