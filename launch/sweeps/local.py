"""Runs of a sweep side by side on this machine, each a process of its own that is started again as a single run is."""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch import exits
from launch.restarts import End, RestartConfig, Restarts, newest_step
from launch.supervise import Group, GroupConfig, Signals
from launch.sweeps.rows import Display, Row
from moe.config import ConfigError, at_least
from moe.sweep.folder import is_finished, last_words, log_path, write_end
from moe.train.lock import is_held
from moe.train.workdir import LOCK_NAME

_POLL_S = 0.1
_HELD_S = 60.0
"""How long a run waits for the process that still holds its folder, as one of a driver killed just now may."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig(RestartConfig):
    """What each of the processes on this machine gets."""

    restarts: int = 2
    """Starts of a run after a failure, in a row without a newer checkpoint, before it counts as failed."""
    grace_s: float = 60.0
    """Seconds that runs have to save and end when the sweep is asked to end; then they are killed."""
    devices: int = 0
    """CPU devices that each run simulates; 0: real ones."""
    gpus: int = 0
    """GPUs of each run, the first worker has the first ones of those visible; 0: an equal share, all for one worker."""
    pin: bool = False
    """Give each worker cores of its own, an equal share, instead of letting all use all."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, devices=0, gpus=0)
        if self.pin and shutil.which("taskset") is None:
            yield "pin", "needs the program taskset, which this machine does not have"


class Worker(NamedTuple):
    """What one of the processes side by side has to itself."""

    environment: dict[str, str]
    prefix: tuple[str, ...]
    """Words before the command."""


def make_workers(count: int, config: LocalConfig, environment: Mapping[str, str]) -> list[Worker]:
    """Devices and cores handed out; ConfigError if there are too few."""
    gpus = [] if config.devices or environment.get("JAX_PLATFORMS") == "cpu" else visible_gpus(environment)
    each = config.gpus or max(1, len(gpus) // count)
    if config.gpus and not gpus:
        raise ConfigError(f"local.gpus = {config.gpus}: no GPU is visible here, or the CPU is asked for")
    if gpus and count * each > len(gpus):
        raise ConfigError(
            f"workers = {count}: with {each} GPUs each they need {count * each}, and {len(gpus)} are visible"
        )
    cores = sorted(os.sched_getaffinity(0)) if config.pin else []
    if config.pin and count > len(cores):
        raise ConfigError(
            f"workers = {count}: with local.pin = True they need as many cores, and {len(cores)} are here"
        )
    share = len(cores) // count
    found = []
    for index in range(count):
        # It is told that it is alone: inside an allocation of SLURM it would look for the job's other processes.
        mine = GroupConfig(devices=config.devices).environment(0, 1)
        if gpus:
            mine["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * each : (index + 1) * each])
        own = ",".join(map(str, cores[index * share : (index + 1) * share]))
        found.append(Worker(mine, ("taskset", "--cpu-list", own) if config.pin else ()))
    return found


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process of this environment would see."""
    if (named := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


@dataclasses.dataclass
class _Running:
    """A run that is not over, and its process where it has one."""

    row: Row
    command: tuple[str, ...]
    restarts: Restarts
    worker: Worker | None = None
    group: Group | None = None
    log_start: int = 0
    """Bytes that the log had before this start."""
    not_before: float = 0.0
    give_up_waiting: float | None = None


class Pool:
    """Works off the runs; `rows` say how each of them fares."""

    def __init__(
        self, root: Path, rows: Sequence[Row], commands: Mapping[str, tuple[str, ...]], workers: Sequence[Worker],
        config: LocalConfig,
    ) -> None:  # fmt: skip
        self._root, self._config, self._free = root, config, list(workers)
        self._left = [
            _Running(row, commands[row.folder], Restarts(newest=newest_step(root / row.folder)))
            for row in rows
            if row.state == "waiting"
        ]

    def run(self, signals: Signals, display: Display) -> None:
        """Until all have ended, or until a signal asks for the end: then the runs save, and what is left stays so."""
        try:
            while self._left and signals.first is None:
                for one in list(self._left):
                    if one.group is not None and one.group.poll():
                        self._settle(one)
                self._start_some()
                display.update()
                time.sleep(_POLL_S)
            self._end_all(signals, display)
        finally:
            for one in self._left:
                if one.group is not None:
                    one.group.kill()
            display.update()

    def _start_some(self) -> None:
        now = time.monotonic()
        for one in self._left:
            if not self._free:
                return
            if one.group is not None or one.not_before > now:
                continue
            if is_held(self._root / one.row.folder / LOCK_NAME):
                one.give_up_waiting = one.give_up_waiting or now + _HELD_S
                if now < one.give_up_waiting:
                    one.not_before, one.row.message = now + 0.5, "another process trains there"
                    continue
            self._start(one)

    def _start(self, one: _Running) -> None:
        one.worker = self._free.pop(0)
        path = log_path(self._root, one.row.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            one.log_start = log.tell()
            command = (*one.worker.prefix, *one.command)
            one.group = Group(command, [one.worker.environment], output=log.fileno())
        one.row.started()

    def _settle(self, one: _Running) -> None:
        """Its process is gone: the run is done, has failed, or waits to be started again."""
        assert one.group is not None and one.worker is not None
        end, row = one.group.ends[0], one.row
        one.group = None
        self._free.insert(0, one.worker)
        row.message = self._last_words(one, end)
        write_end(self._root, row.folder, end.status, row.message)
        if end.status == exits.FINISHED:
            row.state = "done" if is_finished(self._root / row.folder, row.steps) else "failed"
        else:
            decision = one.restarts.after(end, newest_step(self._root / row.folder), self._config)
            one.not_before = time.monotonic() + decision.wait_s
            row.state = "waiting" if decision.again else "failed"
        if row.state != "waiting":
            self._left.remove(one)

    def _last_words(self, one: _Running, end: End) -> str:
        if end.status > 128:  # it had no time for words
            return str(end).partition("(")[2].rstrip(")") or str(end)
        return last_words(log_path(self._root, one.row.folder), one.log_start)

    def _end_all(self, signals: Signals, display: Display) -> None:
        running = [one for one in self._left if one.group is not None]
        if not running:
            return
        display.note("asked to end: the runs save")
        for one in running:
            assert one.group is not None
            one.group.send(15)
        deadline = time.monotonic() + self._config.grace_s
        while running and time.monotonic() < deadline and signals.interrupts < 2:
            for one in list(running):
                if one.group is not None and one.group.poll():
                    self._settle(one)
                    running.remove(one)
            display.update()
            time.sleep(_POLL_S)
