"""Losses and gradients that are not a number: the update is skipped, and after too many the run ends or goes back.

What such a run must be equal to is another run of the same compiled step, in which nothing is poisoned: the updates of
the same steps are put back by hand, or the reader leaves out the same steps of the data.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

from moe.train import events
from tests.faults.injecting import go_on, note_end, telling
from tests.faults.kinds import MAX_SKIPPED
from tests.faults.running import CONFIG, Run, curve, finish, started
from tests.faults.series import Bench, Wanted, charged, new, to_the_end
from tests.faults.tiny import EVERY, LAST_CHANCE
from tests.faults.verdicts import Fault, judge

INNER = f"{CONFIG}:inner"
OF_ROLLBACK = ("rollbacks", "data_step")
"""Metrics that only a run has which may go back."""


def nan(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """Single steps, far from each other, in one run."""
    apart = LAST_CHANCE // len(wanted)
    steps = [draw.randrange(10, apart - 1) + apart * place for place in range(len(wanted))]
    name = f"run-{index:02}"
    run = bench.run(name, config=INNER, inner={"nan_data": steps})
    other = bench.run(f"{name}-reference", config=INNER, inner={"skip": steps})
    faults = [new(kind, index, number, f"step {step}") for (number, kind), step in zip(wanted, steps, strict=True)]
    with charged(faults[-1]):
        for one in (run, other):
            with started(one):
                finish(one)
        found, expected = curve(run), curve(other)
        ends = [*steps[1:], len(expected) + 1]
        for fault, step, end in zip(faults, steps, ends, strict=True):
            before = len(found) == len(expected) and found[: steps[0] - 1] == expected[: steps[0] - 1]
            fault.last = step
            fault.equal = (
                before
                and _skipped(found[step - 1], expected[step - 1])
                and found[step : end - 1] == expected[step : end - 1]
            )
    for fault in faults:
        yield judge(fault)


def _skipped(found: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether the record of a poisoned step counts it; the reference puts its update back after it has counted."""
    once_more = found["skipped_total"] == reference["skipped_total"] + 1 and found["skipped_in_row"] == 1
    same = all(found[name] == reference[name] for name in ("step", "tokens"))
    return found["loss"] == "nan" and once_more and same


def _in_a_row(draw: random.Random) -> list[int]:
    """Steps right after a save, so that it is known to which one the run goes back."""
    first = draw.randrange(4, LAST_CHANCE // EVERY) * EVERY + 1
    return list(range(first, first + MAX_SKIPPED))


def nan_stop(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """The run ends; once the cause is gone, the same command goes on."""
    steps = _in_a_row(draw)
    fault = new(wanted[0][1], index, wanted[0][0], f"steps {steps[0]} to {steps[-1]}")
    flags = ("--max-skipped", str(MAX_SKIPPED))
    with started(bench.run(f"run-{index:02}", config=INNER, inner={"nan_data": steps}, flags=flags)) as run:
        with charged(fault):
            run.wait("its end", lambda: run.status is not None, ends=True)
            fault.status, fault.said = run.status, telling(run.said())
            note_end(run, fault, time.monotonic())
            run.inner, since, began = None, run.log_size(), time.monotonic()
            run.start()
            go_on(run, fault, since, began, bench.reference)
        if not judge(fault).problems:
            to_the_end(run, bench, fault)
    yield fault


def nan_again(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """As of a device that failed once: the same data are read again, with the numbers of the undisturbed run."""
    yield _rolled_back(bench, index, wanted, {"nan_once": _in_a_row(draw)}, ())


def nan_data(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """The data are to blame, whenever they are read: they are left out."""
    yield _rolled_back(bench, index, wanted, {"nan_data": _in_a_row(draw)}, ("--rollback.skip-data", "True"))


def _rolled_back(bench: Bench, index: int, wanted: Wanted, inner: dict[str, Any], more: tuple[str, ...]) -> Fault:
    steps = next(iter(inner.values()))
    fault = new(wanted[0][1], index, wanted[0][0], f"steps {steps[0]} to {steps[-1]}")
    flags = ("--max-skipped", str(MAX_SKIPPED), "--rollback.times", "1", *more)
    run = bench.run(f"run-{index:02}", config=INNER, inner=inner, flags=flags)
    with charged(fault), started(run):
        finish(run)
        fault.said = telling(run.said())
        (event,) = run.events(events.ROLLBACK)
        fault.last, fault.resumed, fault.complete = event["step"], event["to"], [event["to"]]
        expected = bench.reference if not more else _without(bench, run, event["data"])
        fault.equal = curve(run, OF_ROLLBACK) == expected
    return judge(fault)


def _without(bench: Bench, run: Run, data: list[int]) -> list[dict[str, Any]]:
    """The curve of a run whose reader leaves out those steps of the data."""
    first, last = data
    other = bench.run(f"{run.workdir.name}-reference", config=INNER, inner={"jump": [first, last - first + 1]})
    with started(other):
        finish(other)
    return curve(other)
