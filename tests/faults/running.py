"""A run under its supervisor, seen from outside: its processes, its checkpoints, its records, what it said."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.restarts import newest_step
from moe.train import events
from moe.train.events import read_events
from moe.train.metrics import read_metrics
from moe.train.storage import whole_steps
from tests.faults.tiny import STEPS
from tests.launch.runs import environment

ROOT = Path(__file__).parent.parent.parent
CONFIG = "tests/faults/tiny.py"
PROCESSES = 2
GRACE_S = 10
_LIMIT_S = 240.0
"""Seconds after which a run that does not do what is waited for has failed."""
_POLL_S = 0.05


class StuckError(Exception):
    """The run did not come back, or not do what it was waited for."""


@dataclasses.dataclass
class Run:
    """One run from its first start to its end, over as many starts as it takes."""

    workdir: Path
    log: Path
    """What supervisor and processes say."""
    text: Path
    cache: Path
    jit: Path
    """Compilation cache, shared by all runs: else a restart would mostly compile."""
    steps: int = STEPS
    size: int = PROCESSES
    config: str = CONFIG
    flags: tuple[str, ...] = ()
    inner: Mapping[str, Any] | None = None
    """What `tests.faults.tiny.Inner` breaks."""
    submitted: bool = True
    """False: `launch.submit local` is left out, which only starts the supervisor."""
    supervisor: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """The one command, also to go on; returns at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        group = ["--processes", str(self.size), "--devices", "1", "--backoff-s", "0.3", "--grace-s", str(GRACE_S)]
        words = [self.config, "--workdir", str(self.workdir), "--steps", str(self.steps), *self.flags]
        words += ["--data.source.path", str(self.text), "--data.cache-dir", str(self.cache)]
        if self.submitted:
            words = ["launch.submit", "local", *words, *group]
        else:
            group += ["--workdir", str(self.workdir)]
            words = ["launch.supervise", *group, "--", sys.executable, "-m", "launch.train", *words]
        more = {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(self.jit), "TF_CPP_MIN_LOG_LEVEL": "1"}
        inner = {} if self.inner is None else {"MOE_FAULTS": json.dumps(self.inner)}
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                [sys.executable, "-m", *words],
                env=environment(self.text) | more | inner, cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def status(self) -> int | None:
        """Exit status of the one command; None while it runs."""
        assert self.supervisor is not None
        return self.supervisor.poll()

    def end(self) -> None:
        """Kills what is left; the kernel kills the processes of a killed supervisor."""
        if self.supervisor is not None and self.status is None:
            self.supervisor.kill()
            self.supervisor.wait()

    def processes(self) -> dict[int, int]:
        """Process id by process number, of those that live and belong to the run."""
        assert self.supervisor is not None
        found = {}
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{self.supervisor.pid}/task/{self.supervisor.pid}/children")
            for pid in map(int, parent.read_text().split()):
                with contextlib.suppress(OSError):
                    told = re.search(rb"(?:^|\0)MOE_PROCESS_ID=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                    if told and lives(pid):
                        found[int(told[1])] = pid
        return found

    def complete(self) -> list[int]:
        """Steps of the checkpoints that were saved to their end."""
        return whole_steps(self.workdir)

    def newest(self) -> int:
        """Step of the newest of them, 0 without one."""
        return max(newest_step(self.workdir), 0)

    def unfinished(self) -> bool:
        """Whether a save is under way, or was cut off."""
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def records(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return read_metrics(self.workdir / "metrics.jsonl")
        return []

    def last_step(self) -> int:
        """The last step that is recorded to its end."""
        found = self.records()
        return found[-1]["step"] if found else 0

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The diary's entries of these names."""
        return [entry for entry in read_events(self.workdir) if entry["event"] in names]

    def starts(self) -> list[int]:
        """The step at which each start began."""
        return [entry["step"] for entry in self.events(events.STARTED, events.RESUMED)]

    def records_file(self) -> int:
        """Changes when a start has cut the records back to its checkpoint."""
        with contextlib.suppress(FileNotFoundError):
            return (self.workdir / "metrics.jsonl").stat().st_ino
        return 0

    def said(self, since: int = 0) -> str:
        """What supervisor and processes said from a byte of the log on."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0

    def wait(
        self, what: str, condition: Callable[[], bool], *,
        ends: bool = False, limit_s: float = _LIMIT_S, poll_s: float = _POLL_S,
    ) -> None:  # fmt: skip
        """Returns once `condition` holds; StuckError if it does not in time or if the supervisor ended (but `ends`)."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.status is not None and not ends and not condition():
                raise StuckError(f"ended with status {self.status} before {what}: {self.said()[-600:]}")
            if time.monotonic() > deadline:
                raise StuckError(f"not within {limit_s:g} s: {what}: {self.said()[-600:]}")
            time.sleep(poll_s)


def lives(pid: int) -> bool:
    """Whether a process runs, or is stopped; one that is dead and not yet buried does not live."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids: Mapping[int, int]) -> bool:
    return not any(lives(pid) for pid in pids.values())


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def started(run: Run) -> Iterator[Run]:
    """The run, started, and gone at the end whatever happened."""
    run.start()
    try:
        yield run
    finally:
        run.end()


def finish(run: Run) -> None:
    """Waits for its last step; StuckError if it does not end well."""
    run.wait("its end", lambda: run.status is not None, ends=True, limit_s=900)
    if run.status:
        raise StuckError(f"ended with status {run.status}: {run.said()[-600:]}")


def curve(run: Run, leave_out: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Its records without times; numbers that are not finite as words, so that they equal themselves."""
    kept = [
        {name: value for name, value in record.items() if not name.startswith("time/") and name not in leave_out}
        for record in run.records()
    ]
    found: list[dict[str, Any]] = json.loads(json.dumps(kept).replace("NaN", '"nan"').replace("Infinity", '"inf"'))
    return found
