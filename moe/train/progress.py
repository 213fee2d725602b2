"""What a person sees while a run trains: a live line on a terminal, plain lines at intervals everywhere else."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_RATE_WINDOW = 50  # updates that the time left is measured over: long enough to smooth evaluation pauses
_SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


class Progress:
    """Context manager that shows step, loss, speed, time left and the health of the routing.

    Reads these metrics and no others, each only where present: `loss` (nats per token), `time/tokens_per_s`,
    `time/flops_per_s`, `time/mfu` (fraction of the peak), `load/max_violation` (the worst layer is shown),
    `load/dropped` (the mean over layers, as a share of assignments), `skipped_total` (shown when above 0) and
    `eval/bits_per_byte` (kept from the last step that had one).

    On a terminal one line is redrawn in place. On any other stream a plain line is printed every `every_steps` steps
    or, by default, at most every `every_s` seconds, and always for the first update and the last step.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        stream: TextIO | None = None,
        *,
        every_steps: int | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step = total_steps, start_step
        self._stream = sys.stderr if stream is None else stream
        self._every_steps, self._every_s, self._clock = every_steps, every_s, clock
        self._times: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)
        self._bits_per_byte: float | None = None
        self._line = ""
        self._printed: tuple[int, float] | None = None
        self._live: Live | None = None

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows `metrics` of `step`."""
        self._step = step
        self._times.append((step, self._clock()))
        self._bits_per_byte = metrics.get("eval/bits_per_byte", self._bits_per_byte)
        self._line = "  ".join(self._parts(metrics))
        if self._live is not None:
            self._live.update(self._render())
        elif self._due():
            self._print(self._line)
            self._printed = self._times[-1]

    def note(self, text: str) -> None:
        """Prints `text` on a line of its own, above the live line."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._print(text)

    def __enter__(self) -> Self:
        if self._stream.isatty():
            console = Console(file=self._stream, force_terminal=True)
            # Warnings go above the line; stdout may be a file, and redirected it would end up in this stream.
            own = self._stream is sys.stderr
            self._live = Live(self._render(), console=console, redirect_stdout=False, redirect_stderr=own)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._times and self._printed != self._times[-1]:
            self._print(self._line)

    def _due(self) -> bool:
        step, now = self._times[-1]
        if self._printed is None or step >= self._total:
            return True
        if self._every_steps is not None:
            return step - self._printed[0] >= self._every_steps
        return now - self._printed[1] >= self._every_s

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _render(self) -> Table:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=12)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(ProgressBar(total=self._total, completed=self._step, width=12), Text(self._line))
        return line

    def _parts(self, metrics: Mapping[str, Any]) -> list[str]:
        """The pieces of the line, the most wanted first, since a narrow terminal cuts its end."""
        parts = [f"{self._step}/{self._total}"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.4f}")
        if (skipped := int(metrics.get("skipped_total", 0))) > 0:
            parts.append(f"skipped {skipped}")
        if self._bits_per_byte is not None:
            parts.append(f"val {self._bits_per_byte:.4f} bits/byte")
        if "time/tokens_per_s" in metrics:
            parts.append(f"{_si(metrics['time/tokens_per_s'])}tok/s")
        if "time/flops_per_s" in metrics:
            parts.append(f"{_si(metrics['time/flops_per_s'])}FLOP/s")
        if "time/mfu" in metrics:
            parts.append(f"MFU {metrics['time/mfu']:.1%}")
        if (left := self._seconds_left()) is not None:
            parts.append(f"{_duration(left)} left")
        if violation := _values(metrics, "load/max_violation"):
            parts.append(f"imbalance {max(violation):.2f}")
        if dropped := _values(metrics, "load/dropped"):
            parts.append(f"dropped {sum(dropped) / len(dropped):.2%}")
        return parts

    def _seconds_left(self) -> float | None:
        """Steps left times seconds a step over the last updates; the first update (it compiles) starts the clock."""
        (first, started), (last, now) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return (self._total - last) * (now - started) / (last - first)


def _values(metrics: Mapping[str, Any], name: str) -> list[float]:
    value = metrics.get(name, [])
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _si(value: float) -> str:
    """Three significant digits and an SI prefix: 1234567 -> '1.23 M'."""
    if not math.isfinite(value) or value < 1:
        return f"{value:.3g} "
    power = min(int(math.log10(value)) // 3, len(_SI_PREFIXES) - 1)
    if float(f"{value / 1000**power:.3g}") >= 1000 and power < len(_SI_PREFIXES) - 1:
        power += 1
    return f"{float(f'{value / 1000**power:.3g}'):g} {_SI_PREFIXES[power]}"


def _duration(seconds: float) -> str:
    """'42s', '3m05s', '2h07m' or '3d04h'."""
    whole = max(0, round(seconds))
    for size, unit, below, low in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below:02d}{low}"
    return f"{whole}s"
