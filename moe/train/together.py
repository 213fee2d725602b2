"""What each process of a run found by itself, told to all of them, so that none goes on where another cannot.

Collectives: `gather_text` one of 1 KiB a process. All processes call these functions in the same order.
"""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe.train.failures import StorageError

T = TypeVar("T")
_BYTES = 1024
_PATIENCE = 15
"""Times that processes look again, two seconds apart, until a shared disk shows all of them the same."""


def gather_text(text: str) -> list[str]:
    """The text of every process, in order; what is beyond 1 KiB is cut off."""
    if jax.process_count() == 1:
        return [text]
    mine = np.zeros(_BYTES, np.uint8)
    said = np.frombuffer(text.encode()[:_BYTES], np.uint8)
    mine[: len(said)] = said
    found = np.asarray(multihost_utils.process_allgather(mine))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in found]


def together(make: Callable[[], T], kinds: tuple[type[Exception], ...]) -> T:
    """`make()`, unless it raised one of `kinds` in some process: then every process raises what the first of them did.

    `make` must not wait for other processes, or must raise in all of them alike.
    """
    mine, error, made = "", None, None
    try:
        made = make()
    except kinds as found:
        error, mine = found, f"{[isinstance(found, kind) for kind in kinds].index(True)}{found}"
    said = gather_text(mine)
    failed = [process for process, one in enumerate(said) if one]
    if not failed:
        return made  # type: ignore[return-value]
    first = said[failed[0]]
    where = "" if len(failed) == len(said) else f"process {failed[0]}: "
    raise kinds[int(first[0])](where + first[1:]) from error


def the_same(look: Callable[[], Any], what: str) -> Any:
    """`look()`, JSON data, once all processes see the same; StorageError if they do not even after half a minute."""
    for _ in range(_PATIENCE):
        mine = look()
        said = gather_text(json.dumps(mine))
        if len(set(said)) == 1:
            return mine
        time.sleep(2)
    seen = "; ".join(f"process {process} sees {one}" for process, one in enumerate(said))
    raise StorageError(f"{what} are not the same for all processes ({seen}): the workdir must be on a shared disk")
