"""How a run ended, for the scheduler that started it: the exit status says whether to start it again."""

from moe.cluster.roll_call import Absent
from moe.config import ConfigError
from moe.train.failures import Damaged, Diverged, NotFinite, StorageError

FINISHED = 0
FAILED = 1
"""An error that nothing below names, with its traceback; starting again may help (counted)."""
MISTAKE = 2
"""A mistake in the config, on the command line or in how the hosts were started; starting again will not help."""
NUMBERS = 3
"""The numbers went wrong: not finite, replicas that differ, no undamaged checkpoint; a person must look."""
STORAGE = 74
"""The disk is full or unreadable (EX_IOERR); nothing saved is lost, a person must make room."""
AGAIN = 75
"""Saved and ended because somebody asked (SIGTERM, preemption; EX_TEMPFAIL): start again, not counted."""
STALLED = 76
"""The watchdog ended a process in which nothing went on; start again (counted)."""

FINAL = (FINISHED, MISTAKE, NUMBERS, STORAGE)
"""After these nobody starts the run again by himself."""

_OF: dict[type[Exception], int] = {
    ConfigError: MISTAKE,
    NotFinite: NUMBERS,
    Diverged: NUMBERS,
    Damaged: NUMBERS,
    StorageError: STORAGE,
    Absent: FAILED,
}
EXPECTED = tuple(_OF)
"""Errors whose message says everything: one line, no traceback."""


def status_of(error: Exception) -> int:
    """The exit status for one of the `EXPECTED` errors."""
    return next(status for kind, status in _OF.items() if isinstance(error, kind))
