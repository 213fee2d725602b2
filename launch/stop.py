"""When a run has to save and end before its last step."""

import os
import signal
from types import FrameType

from launch import exits


class Stop:
    """Asked after every step. SIGTERM and SIGINT ask a process that is alone; of several, one asked means all.

    Of several processes JAX's preemption service tells all, after the same step, once SIGTERM reached any of them; it
    takes that signal over when the process joins. SIGINT is passed on as SIGTERM. Alone, a second SIGINT
    interrupts; a second SIGTERM does not: schedulers send it more than once.
    """

    def __init__(self, *, alone: bool) -> None:
        self._alone, self._asked, self._number = alone, 0, 0
        signal.signal(signal.SIGINT, self._remember)
        if alone:
            signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._number and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._number = number

    def __call__(self) -> bool:
        if self._alone:
            return self._number != 0
        from jax.experimental import multihost_utils

        self._asked += 1  # not the step, which a rollback would turn back
        return bool(multihost_utils.reached_preemption_sync_point(self._asked))

    @property
    def status(self) -> int:
        return 128 + signal.SIGINT if self._alone and self._number == signal.SIGINT else exits.AGAIN
