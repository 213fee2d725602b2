"""Sees that something goes on: a run in which nothing new happens for long says so, shows where, and at last ends.

The loop names what it begins to do; a thread looks on. JAX returns from a step before the device has done it, so a step
that hangs on the device shows as the wait for its numbers, one step later, and a stalled input pipeline as the wait for
a batch: the two are told apart. What is reported:

    stalled: waiting for the batch of step 41 for 300 s        then the stack of every thread, once for each such wait
"""

import contextlib
import dataclasses
import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TextIO

from moe.config import at_least

log = logging.getLogger(__name__)

_LAST_WORDS_S = 10.0
"""Seconds that the last report may take: a disk or a terminal that hangs must not keep the process from its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run in which nothing goes on says so, and when it ends."""

    report_after_s: float = 300.0
    """Seconds on one thing after which it is reported, with the stacks of all threads; 0: never."""
    stop_after_s: float = 1800.0
    """Seconds on one thing after which the process ends, to be started again; 0: never."""
    stop_compiling_after_s: float = 7200.0
    """The same while a step is compiled, which may take long; 0: never."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, report_after_s=0, stop_after_s=0, stop_compiling_after_s=0)
        for field in ("stop_after_s", "stop_compiling_after_s"):
            if 0 < getattr(self, field) < self.report_after_s:
                yield field, f"must be at least report_after_s = {self.report_after_s:g}, or 0: never"


class Watchdog:
    """Context manager: a thread that looks on while the body runs.

    `on_stop` is called in that thread once the process is to end; it must not return to be of use (os._exit). Without
    one the watchdog only reports. `note` hears before that what the process did.
    """

    def __init__(
        self, config: WatchdogConfig, on_stop: Callable[[], None] | None = None, *,
        note: Callable[[str], None] = lambda what: None, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._config, self._on_stop, self._note, self._clock = config, on_stop, note, clock
        self._stream = sys.stderr if stream is None else stream
        limits = (config.report_after_s, config.stop_after_s, config.stop_compiling_after_s)
        self._tick = min([1.0, *(limit / 4 for limit in limits if limit)])
        self._doing: tuple[str, bool] | None = None
        self._seen: tuple[str, bool] | None = None
        self._looked, self._waited, self._reported = clock(), 0.0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, what: str, *, compiling: bool = False) -> None:
        """From now on the run does `what`; costs as much as an assignment."""
        self._doing = (what, compiling)  # a new object at each call: the same words again are something new too

    def look(self) -> None:
        """What the thread does every second at most; a stall is counted from the first look that saw it."""
        now = self._clock()
        # Time in which the watchdog itself did not run (SIGSTOP, a machine asleep) is no stall.
        passed, self._looked = min(now - self._looked, 2 * self._tick), now
        if self._doing is not self._seen:
            self._seen, self._waited, self._reported = self._doing, 0.0, False
            return
        if self._seen is None or self._ended.is_set():
            return
        self._waited += passed
        (what, compiling), config = self._seen, self._config
        stop_after = config.stop_compiling_after_s if compiling else config.stop_after_s
        if stop_after and self._waited >= stop_after and self._on_stop is not None:
            self._stop(what, stop_after, "stop_compiling_after_s" if compiling else "stop_after_s")
        elif config.report_after_s and self._waited >= config.report_after_s and not self._reported:
            self._reported = True
            log.warning("stalled: %s for %.0f s", what, self._waited)
            self._dump()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._tick):
            self.look()

    def _stop(self, what: str, limit: float, field: str) -> None:
        def last_words() -> None:
            log.error("stalled: %s for %.0f s; the process ends (watchdog.%s = %g)", what, self._waited, field, limit)
            self._dump()
            for handler in logging.getLogger().handlers:
                with contextlib.suppress(OSError, ValueError):  # a stream that is closed has nothing left to say
                    handler.flush()
            self._note(what)

        assert self._on_stop is not None
        speaker = threading.Thread(target=last_words, daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS_S)
        self._ended.set()
        self._on_stop()

    def _dump(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a notebook's stderr has no file below it
            self._stream.flush()
            faulthandler.dump_traceback(self._stream, all_threads=True)
