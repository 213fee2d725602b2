"""The kinds of faults: how many of each are in a hundred, and what the documents promise for each."""

import dataclasses
import math

from tests.faults.tiny import HEARTBEAT_S

STARTS_AGAIN = r"supervisor: process \d ended with status \d+.* until (start|the next start)"
_SLACK_S = 5
"""Seconds that a process may take to end once it knows that it has to, on a busy machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What is done, and what is to follow."""

    what: str
    count: int
    """In a campaign of a hundred faults or a few more."""
    group: str = "mixed"
    """Which kind of run it is injected into."""
    message: str = STARTS_AGAIN
    """What the log must say."""
    status: int | None = None
    """Of the one command, where it ends and a person has to act before it is given again."""
    resumes: bool = True
    """Goes on from the newest good checkpoint with a new start."""
    loses_nothing: bool = False
    damages: bool = False
    """Checkpoints may be found damaged."""
    hits_save: bool = False
    ends_within_s: float = 0.0
    more_steps: int = 0
    """Steps that may be lost beyond the rule."""


MAX_SKIPPED = 3
_ROOM = "No space left on device.*make room, then run the same command again"

KINDS = {
    "kill": Kind(what="kill -9 of one process, of all or of the supervisor, at a random time", count=26, message=""),
    "kill_starting": Kind(what="kill -9, and again while the run starts", count=6),
    "kill_saving": Kind(what="kill -9 of one process inside a save", count=14, hits_save=True),
    "sigterm": Kind(
        what="SIGTERM to one process, to all or to the supervisor", count=14, loses_nothing=True,
        message=r"status 75|SIGTERM: the processes are asked|supervisor: finished",
    ),
    "sigstop": Kind(
        what="SIGSTOP of one process", count=8, message=r"killed process \d, still running",
        ends_within_s=HEARTBEAT_S + _SLACK_S,
    ),
    "truncate": Kind(what="a file of the newest checkpoint cut short", count=10, damages=True),
    "flip": Kind(what="one bit of the newest checkpoint flipped", count=14, damages=True),
    "stall": Kind(
        what="a reader that hangs", count=2, group="stall",
        message=r"for 10 s; the process ends \(watchdog.stop_after_s",
    ),
    "disk": Kind(what="the disk is full", count=6, group="disk", status=74, message=_ROOM),
    "disk_one": Kind(
        what="the disk is full for one process alone", count=2, group="disk_one", status=74, message=_ROOM
    ),
    "data": Kind(
        what="packed tokens or documents cut short, changed or gone", count=6, group="data", status=74,
        message="(cannot be read|ends after|are not what was written|were written|cannot be opened).*is built again",
    ),
    "source": Kind(
        what="a text of the source changed or gone", count=2, group="data", status=2,
        message="data: fingerprint = .* the saved position has",
    ),
    "nan": Kind(
        what="loss and gradients not a number, update skipped", count=4, group="nan", message="", resumes=False
    ),
    "nan_stop": Kind(
        what="not a number 3 times in a row, no rollback asked for", count=1, group="nan_stop", status=3,
        message=rf"was not finite in {MAX_SKIPPED} updates in a row", more_steps=MAX_SKIPPED,
    ),
    "nan_again": Kind(
        what="the same once, rollback, data read again", count=1, group="nan_again", more_steps=MAX_SKIPPED,
        message="rollback 1 of 1: .* of the data are read again", resumes=False,
    ),
    "nan_data": Kind(
        what="the same in the data, rollback, data skipped", count=1, group="nan_data", more_steps=MAX_SKIPPED,
        message="rollback 1 of 1: .* of the data are skipped", resumes=False,
    ),
}  # fmt: skip


def counts(faults: int, only: list[str] | None = None) -> dict[str, int]:
    """How many of each kind: at least `faults` together, unless only some kinds are wanted."""
    return {name: math.ceil(kind.count * faults / 100) for name, kind in KINDS.items() if only is None or name in only}
