"""What happened to a run beside training: `WORKDIR/events.jsonl`, one object a line {"time", "event", "step", ...}.

A diary for people and for the report; nothing reads it to decide how a run goes on. Process 0 alone writes it, each
line with one append, so that a kill tears the last line at most; the next start cuts that line away.
"""

import datetime
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

NAME = "events.jsonl"

STARTED = "started"
RESUMED = "resumed"
PREEMPTED = "preempted"
"""Asked to end before the last step; the state is saved."""
ROLLBACK = "rollback"
DAMAGED = "damaged checkpoint skipped"
STALLED = "stalled"
"""The watchdog of process 0 ended the run; that of another process writes to stderr alone."""
FINISHED = "finished"


class Events:
    """Appends to the diary of a workdir; on every process but the first it does nothing."""

    def __init__(self, workdir: Path):
        self._path = workdir / NAME
        if self._writes() and self._path.exists():
            _cut_torn_line(self._path)

    def write(self, event: str, step: int | None = None, **more: Any) -> None:
        """One line; `more` is JSON data. A diary that cannot be written is a warning, never the end of a run."""
        if not self._writes():
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"time": now, "event": event} | ({} if step is None else {"step": step}) | more
        try:
            line = (json.dumps(entry) + "\n").encode()
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(file, line)
            finally:
                os.close(file)
            if written < len(line):  # the disk is full
                _cut_torn_line(self._path)
                raise OSError(f"only {written} of {len(line)} bytes were written")
        except OSError as error:
            log.warning("%s: cannot note %r (%s)", self._path, event, error)

    @staticmethod
    def _writes() -> bool:
        return jax.process_index() == 0


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """The entries of a workdir's diary, oldest first; none if there is no diary. A torn last line is left out.

    Raises: ValueError, with file and line, for damage anywhere else.
    """
    path = workdir / NAME
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            _ = entry["time"], entry["event"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # every complete line ends in a newline, so the last piece is empty or torn
                return found
            raise ValueError(f"{path}:{number}: not an event: {line[:60]!r}") from error
        found.append(entry)
    return found


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    if (end := content.rfind(b"\n") + 1) < len(content):
        os.truncate(path, end)
