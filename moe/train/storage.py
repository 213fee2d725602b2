"""A disk that is full, gone or not writable, as one clear error: what failed, what is free and safe, what to do."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe.train.failures import StorageError

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in a workdir."""
ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EFBIG}
    | {errno.EACCES, errno.EPERM}
)


def storage_reason(error: BaseException | None) -> str | None:
    """The system's words if the error, or what it was raised from, comes from the disk; None otherwise."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in ERRNOS:
            return os.strerror(number)
        if number is None:  # tensorstore raises ValueError, with the system's words in its own
            said = str(error)
            for words in map(os.strerror, ERRNOS):
                if words in said:
                    return words
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def storage_errors(failed: str, workdir: Path) -> Iterator[None]:
    """Turns what the disk refuses into StorageError, which begins with `failed`; other errors pass."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        whole = ", ".join(map(str, whole_steps(workdir)))
        kept = f"the checkpoints of the steps {whole} are whole" if whole else "no checkpoint was saved yet"
        raise StorageError(
            f"{failed}: {reason} ({workdir}: {_free(workdir)}); {kept}; make room, then run the same command again"
        ) from error


def whole_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that were saved to their end, rising; their bytes are not looked at."""
    with contextlib.suppress(OSError):
        return sorted(int(path.name) for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdigit())
    return []


def _free(workdir: Path) -> str:
    """Space on the disk of the nearest folder that there is."""
    for folder in (workdir, *workdir.parents):
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free:,} bytes free"
    return "its disk does not answer"
