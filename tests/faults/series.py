"""Runs with faults: every series yields its faults one by one and compares the whole run at its end."""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults.injecting import Records, go_on, note_end, ready, strike
from tests.faults.running import CONFIG, PROCESSES, Run, StuckError, curve, finish, gone, started
from tests.faults.tiny import STEPS
from tests.faults.verdicts import Fault, judge
from tests.launch.runs import write_text


@dataclasses.dataclass
class Bench:
    """What the runs of a campaign share."""

    root: Path
    steps: int = STEPS
    size: int = PROCESSES
    submitted: bool = True
    reference: Records = dataclasses.field(default_factory=list)

    def run(self, name: str, *, own_data: bool = False, workdir: Path | None = None, **more: Any) -> Run:
        """A run that has not started; `own_data`: text and cache are its own, to be damaged."""
        where = self.root / f"{name}-data" if own_data else self.root
        if not (where / "text").is_dir():
            write_text(where / "text")
        workdir, log = workdir or self.root / name, self.root / f"{name}.log"
        return Run(
            workdir,
            log,
            where / "text",
            where / "cache",
            self.root / "jit",
            self.steps,
            submitted=self.submitted,
            **more,
        )

    def make_reference(self) -> None:
        """The run that nobody disturbs; what is there already is not run again."""
        run = self.run("reference")
        if len(run.records()) < self.steps:
            with started(run):
                finish(run)
        self.reference = curve(run)
        assert [record["step"] for record in self.reference] == list(range(1, self.steps + 1))


Wanted = Sequence[tuple[int, str]]
"""Number and kind of faults."""
Series = Callable[[Bench, int, Wanted, random.Random], Iterator[Fault]]
"""Bench and number of the run, faults; may yield only the first of them, the rest is for another run."""


def mixed(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """Signals and damaged checkpoints, as many as one run has room for."""
    with started(bench.run(f"run-{index:02}")) as run:
        yield from in_turn(
            run, bench, index, wanted, lambda number, kind: strike(run, kind, number, draw, bench.reference, index)
        )


def in_turn(run: Run, bench: Bench, index: int, wanted: Wanted, inject: Callable[[int, str], Fault]) -> Iterator[Fault]:
    """One fault whenever the run has recovered from the one before; the last one answers for the run's end."""
    held: Fault | None = None
    for number, kind in wanted:
        try:
            if not ready(run):
                break
        except StuckError as stuck:
            held = held or new(kind, index, number)
            held.problems.append(str(stuck))
            break
        if held is not None:
            yield held
        held = inject(number, kind)
        if held.problems:
            break
    if held is not None:
        if not held.problems:
            to_the_end(run, bench, held)
        yield held


def new(kind: str, index: int, number: int, target: str = "") -> Fault:
    """A fault of which nothing is known yet."""
    return Fault(kind=kind, run=index, number=number, target=target, last=0, complete=[])


def to_the_end(run: Run, bench: Bench, fault: Fault) -> None:
    """Lets the run go to its last step and compares all of it."""
    with charged(fault):
        finish(run)
        if curve(run) != bench.reference:
            fault.problems.append("at its end the curve of the run is not that of the reference run")


@contextlib.contextmanager
def charged(fault: Fault) -> Iterator[None]:
    """A run that is stuck is a problem of the fault."""
    try:
        yield
    except StuckError as stuck:
        fault.problems.append(str(stuck))


def stall(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """A reader that hangs once, in one process; a run each."""
    limits = ("--watchdog.report-after-s", "5", "--watchdog.stop-after-s", "10", "--cluster.heartbeat-timeout-s", "60")
    process, step, stalled = draw.randrange(2), draw.randrange(20, 60), bench.root / f"run-{index:02}.stalled"
    inner = {"stall": [process, step], "happened": str(stalled)}
    fault = new(wanted[0][1], index, wanted[0][0], f"reader of process {process} at step {step}")
    with started(bench.run(f"run-{index:02}", config=f"{CONFIG}:inner", inner=inner, flags=limits)) as run:
        with charged(fault):
            run.wait("the reader to hang", stalled.exists)
            began, pids = time.monotonic(), run.processes()
            run.wait("the watchdog", lambda: gone(pids))
            note_end(run, fault, began)
            go_on(run, fault, 0, began, bench.reference)
        if not judge(fault).problems:
            to_the_end(run, bench, fault)
        yield fault
