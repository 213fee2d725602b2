"""Whether a run that ended is started again, after how long, and when that ends: the same everywhere.

Starts that follow a failure count only until a newer checkpoint is complete: a crash loop is bounded, a long run that
loses a host every day is not. Needs the standard library alone, so that asking costs nothing.
"""

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import exits
from moe.config import at_least

MEANINGS = {
    exits.FAILED: "an error, see its traceback",
    exits.MISTAKE: "a mistake in the config or the start",
    exits.NUMBERS: "the numbers went wrong",
    exits.STORAGE: "the disk is full or unreadable",
    exits.AGAIN: "it saved and was asked to end",
    exits.STALLED: "nothing went on in it",
}
_TELLING = (exits.MISTAKE, exits.NUMBERS, exits.STORAGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """How a run comes back."""

    restarts: int = 5
    """Starts after a failure, in a row without a newer complete checkpoint, before giving up. Starts after a run was
    asked to end (status 75) do not count; after a mistake, wrong numbers or a full disk there is none."""
    backoff_s: float = 3.0
    """Seconds before the first start after a failure; doubled at every one that follows without progress."""
    backoff_cap_s: float = 60.0
    """The longest wait."""
    grace_s: float = 60.0
    """Seconds that the other processes have to end by themselves once one has ended badly."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, restarts=0, backoff_s=0, backoff_cap_s=self.backoff_s, grace_s=0)


@dataclasses.dataclass(frozen=True)
class End:
    """How one process ended: 0 to 255 as a shell says it, so that 137 is signal 9."""

    process: int
    status: int

    def __str__(self) -> str:
        if self.status > 128:
            number = self.status - 128
            known = number in signal.valid_signals()
            meaning = f"ended by signal {number}" + (f", {signal.Signals(number).name}" if known else "")
        else:
            meaning = MEANINGS.get(self.status, "")
        return f"process {self.process} ended with status {self.status}" + (f" ({meaning})" if meaning else "")


def most_telling(ends: Sequence[End]) -> End:
    """The one that says what happened, of ends in the order in which they came.

    What nobody can repair by starting again comes first; then the first failure, because those after it are mostly
    its consequence: a process that loses its peers is ended too. 75 and 0 say something only if nothing failed.
    """
    by_status = {end.status: end for end in reversed(ends)}
    for status in _TELLING:
        if status in by_status:
            return by_status[status]
    failed = [end for end in ends if end.status not in (exits.FINISHED, exits.AGAIN)]
    return failed[0] if failed else by_status.get(exits.AGAIN, ends[0])


def newest_step(workdir: Path) -> int:
    """Step of the newest complete checkpoint, -1 without one. One that is being written has another name."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=-1)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What follows an end: another start after `wait_s`, or the end of it all."""

    again: bool
    wait_s: float
    line: str
    """What happened and what follows, for a person."""


@dataclasses.dataclass
class Restarts:
    """Counts the starts that followed a failure; `dataclasses.asdict` is what outlives a process of its own."""

    newest: int
    """The newest step of which a checkpoint was complete at any end so far, or at the first start."""
    failures: int = 0
    """In a row, without progress."""

    def after(self, end: End, newest: int, config: RestartConfig) -> Decision:
        progress, self.newest = newest > self.newest, max(newest, self.newest)
        if progress:
            self.failures = 0
        if end.status in exits.FINAL:
            return Decision(False, 0, f"{end}; starting it again would not help" if end.status else "finished")
        if end.status == exits.AGAIN:
            # Without progress somebody ends it as soon as it runs: not a failure, but no reason to hurry either.
            wait = 0 if progress else config.backoff_s
            return Decision(True, wait, f"{end}; {wait:g} s until the next start, which does not count")
        self.failures += 1
        if self.failures > config.restarts:
            what = f"{self.failures} failures in a row without progress, restarts = {config.restarts}"
            return Decision(False, 0, f"{end}; given up: {what}")
        wait = min(config.backoff_s * 2 ** (self.failures - 1), config.backoff_cap_s)
        count = f"start {self.failures} of at most {config.restarts} without progress"
        return Decision(True, wait, f"{end}; {wait:g} s until {count}")
