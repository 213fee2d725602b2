"""One fault into a run that goes under its supervisor, and what comes of it, until the run goes on."""

import random
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe.train import events
from tests.faults.running import Run, StuckError, curve, gone, lives, send
from tests.faults.tiny import LAST_CHANCE
from tests.faults.verdicts import Fault, judge

Records = list[dict[str, Any]]


def ready(run: Run, until: int = LAST_CHANCE) -> bool:
    """Waits until the run has saved since its last start and has two checkpoints; False if it is beyond `until`."""
    pids: Mapping[int, int] = {}

    def settled() -> bool:
        nonlocal pids
        pids = run.processes()
        starts = run.starts()
        return bool(starts) and run.newest() > starts[-1] and len(run.complete()) > 1 and len(pids) == run.size

    run.wait("a checkpoint of its own", lambda: run.status is not None or settled(), ends=True)
    if run.status:
        raise StuckError(f"ended with status {run.status}: {run.said()[-600:]}")
    return run.status is None and run.last_step() < until


def strike(
    run: Run, kind: str, number: int, draw: random.Random, reference: Records, index: int = 0, files: str = "**/*"
) -> Fault:
    """Injects one of the mixed faults into a run that is `ready`, and waits until the run goes on.

    `files`: which ones of a checkpoint may be damaged.
    """
    since, began = run.log_size(), time.monotonic()
    fault = Fault(kind=kind, run=index, number=number, target="", last=0, complete=[])
    try:
        before = run.processes()
        began = ACTS[kind](run, fault, before, draw)
        note_end(run, fault, began)
        if kind in DAMAGES:
            damage(run, fault, draw, files)
        fault.status = run.status
        if kind == "sigterm" and run.status == 0:  # it had done its last step before all processes had agreed to stop
            fault.said, fault.equal = telling(run.said(since)), same_so_far(run, reference)
            return judge(fault)
        if run.status is not None:
            run.start()
        go_on(run, fault, since, began, reference)
        if kind == "kill_saving" and not fault.hit_save:
            fault.kind = "kill"  # the save was complete after all
    except StuckError as stuck:
        fault.problems.append(str(stuck))
    return judge(fault)


def note_end(run: Run, fault: Fault, began: float) -> None:
    """What is there now that no process of the run is left."""
    fault.last, fault.complete, fault.hit_save = run.last_step(), run.complete(), run.unfinished()
    fault.ended_s = fault.ended_s or time.monotonic() - began


def go_on(run: Run, fault: Fault, since: int, began: float, reference: Records) -> None:
    """Waits until the run, started again, has made a new step; notes where it went on and whether its curve is right.

    `since`: byte of the log from which on it is about this fault. Called while no process has begun its work.
    """
    starts, file, damaged = len(run.starts()), run.records_file(), len(run.events(events.DAMAGED))

    def new_step() -> bool:
        began_at = run.starts()[starts:]
        return bool(began_at) and run.records_file() != file and run.last_step() > began_at[-1]

    run.wait("a new step", new_step, ends=True)
    fault.seconds = time.monotonic() - began
    fault.resumed = run.starts()[starts]
    for entry in run.events(events.DAMAGED)[damaged:]:
        if list((run.workdir / "damaged").glob(f"{entry['step']}-*")):
            fault.damaged.append(entry["step"])
    fault.said += telling(run.said(since))
    fault.equal = same_so_far(run, reference)


def same_so_far(run: Run, reference: Records, leave_out: tuple[str, ...] = ()) -> bool:
    """Whether every step up to the last recorded one is there once and as in the reference."""
    found = curve(run, leave_out)
    return bool(found) and found == reference[: len(found)]


def telling(log: str) -> list[str]:
    """The lines of the supervisor, the errors and the warnings."""
    wanted = re.compile(r"supervisor: |error: |damaged|checkpoint \d+|stalled: |rollback|not finite")
    return [line[:400] for line in log.splitlines() if wanted.search(line)]


def _kill(run: Run, fault: Fault, pids: Mapping[int, int], draw: random.Random) -> float:
    time.sleep(draw.uniform(0, 0.8))
    aim = draw.choice([*pids, *pids, *pids, "all", "supervisor"])
    return _send(run, fault, pids, aim, signal.SIGKILL)


def _kill_starting(run: Run, fault: Fault, pids: Mapping[int, int], draw: random.Random) -> float:
    began = _send(run, fault, pids, draw.choice([*pids]), signal.SIGKILL)
    run.wait("new processes", lambda: len(run.processes()) == run.size)
    new = run.processes()
    time.sleep(draw.uniform(0, 5))
    target = fault.target
    _send(run, fault, new, draw.choice([*new]), signal.SIGKILL)
    fault.target = f"{target}, then {fault.target}"
    return began


def _kill_saving(run: Run, fault: Fault, pids: Mapping[int, int], draw: random.Random) -> float:
    run.wait("a save to end", lambda: not run.unfinished(), poll_s=0.002)
    run.wait("a save to begin", run.unfinished, poll_s=0.002)
    time.sleep(draw.uniform(0, 0.01))
    return _send(run, fault, pids, draw.choice([*pids]), signal.SIGKILL)


def _sigterm(run: Run, fault: Fault, pids: Mapping[int, int], draw: random.Random) -> float:
    time.sleep(draw.uniform(0, 0.3))
    return _send(run, fault, pids, draw.choice([*pids, *pids, "all", "supervisor"]), signal.SIGTERM)


def _sigstop(run: Run, fault: Fault, pids: Mapping[int, int], draw: random.Random) -> float:
    time.sleep(draw.uniform(0, 0.3))
    aim = draw.choice([*pids])
    others = {number: pid for number, pid in pids.items() if number != aim}
    began = time.monotonic()
    fault.target = f"process {aim}"
    send(pids[aim], signal.SIGSTOP)
    run.wait("the others to end", lambda: gone(others), limit_s=90)
    fault.ended_s = time.monotonic() - began
    run.wait("the stopped one to be killed", lambda: gone(pids), limit_s=90)
    return began


def _kill_all(run: Run, fault: Fault, pids: Mapping[int, int], draw: random.Random) -> float:
    time.sleep(draw.uniform(0, 0.3))
    return _send(run, fault, pids, "all", signal.SIGKILL)


def _send(run: Run, fault: Fault, pids: Mapping[int, int], aim: int | str, number: signal.Signals) -> float:
    """Sends it, waits until no process of this start is left, returns when it was sent."""
    assert run.supervisor is not None
    fault.target = aim if isinstance(aim, str) else f"process {aim}"
    targets = {"all": [*pids.values()], "supervisor": [run.supervisor.pid]}.get(str(aim)) or [pids[int(aim)]]
    if not all(map(lives, targets)):
        raise StuckError(f"{fault.target} had ended before the fault: {run.said()[-600:]}")
    began = time.monotonic()
    for pid in targets:
        send(pid, number)
    ends = aim == "supervisor"
    run.wait("all to end", lambda: gone(pids) and (not ends or run.status is not None), ends=True, limit_s=90)
    return began


ACTS: dict[str, Callable[[Run, Fault, Mapping[int, int], random.Random], float]] = {
    "kill": _kill,
    "kill_starting": _kill_starting,
    "kill_saving": _kill_saving,
    "sigterm": _sigterm,
    "sigstop": _sigstop,
    "truncate": _kill_all,
    "flip": _kill_all,
}
DAMAGES = ("truncate", "flip")


def damage(run: Run, fault: Fault, draw: random.Random, files: str) -> None:
    """Cuts a file of the newest checkpoint short, or flips one of its bits."""
    newest = run.workdir / "checkpoints" / str(run.newest())
    found = sorted(path for path in newest.glob(files) if path.is_file() and path.stat().st_size)
    # By size half of the time: most files are small and many say nothing about the state.
    sizes = [path.stat().st_size for path in found]
    path = draw.choice(found) if draw.random() < 0.5 else draw.choices(found, sizes)[0]
    where = f"{newest.name}/{path.relative_to(newest)}"
    if fault.kind == "truncate":
        fault.target = f"{where} to {truncate(path, draw)} bytes"
    else:
        fault.target = f"{where} bit {flip(path, draw)}"


def truncate(path: Path, draw: random.Random) -> int:
    """Cuts it at a random length, which is returned."""
    length = draw.randrange(path.stat().st_size)
    with path.open("rb+") as file:
        file.truncate(length)
    return length


def flip(path: Path, draw: random.Random) -> int:
    """Flips a random bit, whose number is returned."""
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    with path.open("rb+") as file:  # in place, for who has it open
        file.write(content)
    return bit
