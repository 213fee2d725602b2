"""What a person sees while a sweep runs: a table that is redrawn on a terminal, a line a change everywhere else."""

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe.sweep.folder import last_record

State = Literal["waiting", "running", "done", "failed"]
_ORDER: tuple[State, ...] = ("running", "failed", "waiting", "done")
_READ_S = 1.0
"""Seconds between two looks at the metrics of a run."""
_LINE_S = 60.0
"""Seconds between two plain lines about runs that go on."""


@dataclasses.dataclass
class Row:
    """How a run fares."""

    root: Path
    folder: str
    steps: int
    state: State = "waiting"
    message: str = ""
    step: int = 0
    loss: float | str | None = None
    _start: tuple[float, int] | None = None
    """(time, step) when the first record of this start was seen."""

    def started(self) -> None:
        self.state, self.message, self._start = "running", "", None

    def look(self) -> None:
        """Reads how far the run is."""
        record = last_record(self.root / self.folder)
        if record is None:
            return
        self.step, self.loss = record["step"], record.get("loss")
        if self._start is None or self.step < self._start[1]:
            self._start = (time.monotonic(), self.step)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step, at the speed since the start."""
        if self.state != "running" or self._start is None or self.step <= self._start[1]:
            return None
        done = self.step - self._start[1]
        return (time.monotonic() - self._start[0]) / done * (self.steps - self.step)

    @property
    def line(self) -> str:
        parts = [f"{self.folder}: {self.state}", f"step {self.step}/{self.steps}"]
        parts += [f"loss {_number(self.loss)}"] if self.loss is not None else []
        parts += [f"{_clock(self.left_s)} left"] if self.left_s is not None else []
        parts += [self.message] if self.message and self.state != "done" else []
        return ", ".join(parts)


class Display:
    """Context manager that shows the rows; `update` as often as you like."""

    def __init__(self, rows: Sequence[Row], stream: TextIO | None = None) -> None:
        self._rows, self._stream = rows, sys.stderr if stream is None else stream
        self._live: Live | None = None
        self._seen = {row.folder: row.state for row in rows}
        self._looked = self._said = time.monotonic()

    def __enter__(self) -> Self:
        for row in self._rows:
            row.look()
        if self._stream.isatty():
            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(self._table(console), console=console, redirect_stdout=False, auto_refresh=False)
            self._live.start()
        else:
            self.note(self._counts())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._looked = float("-inf")
        self.update()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self) -> None:
        now = time.monotonic()
        changed = [row for row in self._rows if self._seen[row.folder] != row.state]
        for row in changed:
            row.look()
            self._seen[row.folder] = row.state
        if now - self._looked >= _READ_S:
            self._looked = now
            for row in self._rows:
                if row.state == "running":
                    row.look()
        elif not changed:
            return
        if self._live is not None:
            self._live.update(self._table(self._live.console), refresh=True)
            return
        if now - self._said >= _LINE_S:
            changed = [row for row in self._rows if row in changed or row.state == "running"]
        if changed:
            self._said = now
        for row in changed:
            self.note(f"{self._counts()}; {row.line}")

    def note(self, text: str) -> None:
        """A line of its own, above the table."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def _counts(self) -> str:
        count = Counter(row.state for row in self._rows)
        return f"{len(self._rows)} runs: " + ", ".join(f"{count[state]} {state}" for state in _ORDER if count[state])

    def _table(self, console: Console) -> Table:
        """As many rows as the terminal has room for, those that a person waits for first."""
        table = Table(box=None, title=self._counts(), title_justify="left", title_style="bold", expand=True)
        table.add_column("run", no_wrap=True, overflow="ellipsis", ratio=2)
        table.add_column("state")
        table.add_column("", width=12)
        for name in ("step", "loss", "left"):
            table.add_column(name, justify="right")
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=2)
        ordered = sorted(self._rows, key=lambda row: _ORDER.index(row.state))
        for row in ordered[: max(3, console.height - 5)]:
            bar = ProgressBar(total=row.steps, completed=row.step, width=12)
            style = {"failed": "red", "done": "green", "running": "bold"}.get(row.state, "")
            loss = "" if row.loss is None else _number(row.loss)
            left = "" if row.left_s is None else _clock(row.left_s)
            table.add_row(
                Text(row.folder), Text(row.state, style), bar, f"{row.step}/{row.steps}", loss, left,
                Text(row.message if row.state != "done" else ""),
            )  # fmt: skip
        return table


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _clock(seconds: float | None) -> str:
    minutes, second = divmod(round(seconds or 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
