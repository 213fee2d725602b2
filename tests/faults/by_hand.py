"""Faults after which the command ends with a message: a full disk, data that cannot be read.

A person mends what the message names and gives the same command again; so does this.
"""

import contextlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.injecting import flip, go_on, note_end, telling, truncate
from tests.faults.running import CONFIG, Run, StuckError, send, started
from tests.faults.series import Bench, Wanted, charged, in_turn, new, to_the_end
from tests.faults.tiny import EVERY
from tests.faults.verdicts import Fault, judge

Mend = Callable[[], object]
Break = Callable[[Run, Fault, random.Random], Mend]
"""Breaks something, says what in the fault, returns what mends it."""


def disk(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """A disk of 6 MiB that is full, again and again."""
    folder = bench.root / f"disk-{index:02}"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)], check=True)
    try:
        with started(bench.run(f"run-{index:02}", workdir=folder / "run")) as run:
            yield from in_turn(
                run, bench, index, wanted, lambda number, kind: _one(run, bench, new(kind, index, number), draw, _fill)
            )
        shutil.copytree(run.workdir, bench.root / f"run-{index:02}")
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def disk_one(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """A disk that only one process finds full: the other must not wait for it for ever."""
    process, step, refused = draw.randrange(2), EVERY * draw.randrange(2, 6), bench.root / f"run-{index:02}.refused"
    inner = {"refuse": [process, step], "happened": str(refused)}
    fault = new(wanted[0][1], index, wanted[0][0], f"process {process}, save of step {step}")
    with started(bench.run(f"run-{index:02}", config=f"{CONFIG}:inner", inner=inner)) as run:
        with charged(fault):
            run.wait("the save to be refused", refused.exists)
            mended(run, bench, fault, 0, time.monotonic(), lambda: None)
        if not judge(fault).problems:
            to_the_end(run, bench, fault)
    yield fault


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    with contextlib.suppress(OSError):
        return not any(
            subprocess.run(words, capture_output=True).returncode for words in (mount, ["umount", str(folder)])
        )
    return False


def data(bench: Bench, index: int, wanted: Wanted, draw: random.Random) -> Iterator[Fault]:
    """Text and prepared data of the run's own."""

    def inject(number: int, kind: str) -> Fault:
        case = CASES[kind][number % len(CASES[kind])]
        return _one(run, bench, new(kind, index, number), draw, case)

    with started(bench.run(f"run-{index:02}", own_data=True)) as run:
        yield from in_turn(run, bench, index, wanted, inject)


def _one(run: Run, bench: Bench, fault: Fault, draw: random.Random, broken: Break) -> Fault:
    with charged(fault):
        time.sleep(draw.uniform(0, 0.3))
        since, began = run.log_size(), time.monotonic()
        mend = broken(run, fault, draw)
        mended(run, bench, fault, since, began, mend)
    return judge(fault)


def mended(run: Run, bench: Bench, fault: Fault, since: int, began: float, mend: Mend) -> None:
    """Waits for the command to end, mends what is broken, gives the command again."""
    run.wait("the command to end", lambda: run.status is not None, ends=True, limit_s=120)
    fault.status, fault.said = run.status, telling(run.said(since))
    note_end(run, fault, began)
    mend()
    since, began = run.log_size(), time.monotonic()
    run.start()
    go_on(run, fault, since, began, bench.reference)


def _fill(run: Run, fault: Fault, draw: random.Random) -> Mend:
    """All but a few pages of the disk."""
    ballast, left = run.workdir.parent / "ballast", draw.randrange(64)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with ballast.open("rb+") as file:
        file.truncate(max(0, ballast.stat().st_size - 4096 * left))
    fault.target = f"{4 * left} KiB left"
    return ballast.unlink


def _cut_tokens(run: Run, fault: Fault, draw: random.Random) -> Mend:
    path = _any_of(run.cache, "tokens-*/*.tokens", draw)
    fault.target = f"{path.name} cut to {truncate(path, draw)} bytes while it is read"
    return lambda: _delete_as_told(fault)


def _prepared(pattern: str, act: Callable[[Path, random.Random], object], words: str) -> Break:
    """Damage of the cache that the next start finds."""

    def broken(run: Run, fault: Fault, draw: random.Random) -> Mend:
        path = _any_of(run.cache, pattern, draw)
        act(path, draw)
        fault.target = f"{path.name} {words}, then kill -9"
        _kill_one(run, draw)
        return lambda: _delete_as_told(fault)

    return broken


def _source(act: Callable[[Path, random.Random], object], words: str) -> Break:
    """Another text than the one the run began with, at the next start."""

    def broken(run: Run, fault: Fault, draw: random.Random) -> Mend:
        path = _any_of(run.text, "*/*.txt", draw)
        content = path.read_bytes()
        act(path, draw)
        fault.target = f"{path.parent.name}/{path.name} {words}, then kill -9"
        _kill_one(run, draw)
        return lambda: path.write_bytes(content)

    return broken


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _change_letter(path: Path, draw: random.Random) -> None:
    """The lowest bit of a letter: still text."""
    content = bytearray(path.read_bytes())
    content[draw.choice([at for at, byte in enumerate(content) if byte != 32])] ^= 1
    path.write_bytes(content)


def _kill_one(run: Run, draw: random.Random) -> None:
    pids = run.processes()
    send(pids[draw.choice([*pids])], signal.SIGKILL)


def _any_of(folder: Path, pattern: str, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob(pattern)))


def _delete_as_told(fault: Fault) -> None:
    """What the message asks for, word by word."""
    for line in fault.said:
        if told := re.search(r"error: (?:.*: )?(/\S+?)[: ].*delete (\S+) and it is built again", line):
            shutil.rmtree(told[1] if told[2] == "it" else told[2])
            return
    raise StuckError(f"says nothing to delete: {fault.said}")


_SHARD = "documents-*/**/*validation*array_record*"
CASES: dict[str, tuple[Break, ...]] = {
    "data": (
        _cut_tokens,
        _prepared("tokens-*/*.tokens", flip, "with one bit flipped"),
        _prepared("tokens-*/*.tokens", _remove, "gone"),
        _prepared(_SHARD, truncate, "cut short"),
        _prepared("tokens-*/*.npy", truncate, "cut short"),
        _prepared(_SHARD, _remove, "gone"),
    ),
    "source": (_source(_change_letter, "changed"), _source(_remove, "gone")),
}
