"""Reading prepared data so that a fault has a name: retries with back-off, checksums, no signal instead of an error.

Tokens are read with `pread`, not through a memory map: on a file that was cut short, or on a disk that fails, a map
kills the process with SIGBUS, while a read is an error that can be retried and told. It costs 2 us a window, of 15.
"""

import logging
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

logger = logging.getLogger(__name__)

PIECE = 16 * 2**20
"""Bytes that one checksum is over."""

T = TypeVar("T")


class DataError(RuntimeError):
    """Prepared text or tokens that cannot be read, or that are not what was written; one line that says what to do."""


class Patience(NamedTuple):
    """How often a read that failed is tried again; the waits double."""

    retries: int = 0
    backoff_s: float = 1.0

    def read(self, what: str, attempt: Callable[[], T], *errors: type[Exception]) -> T:
        """What `attempt` returns, tried again after OSError and `errors`; raises the last one once that is enough."""
        for retry in range(self.retries):
            try:
                return attempt()
            except (OSError, *errors) as error:  # type: ignore[misc]  # mypy cannot follow the star
                wait = self.backoff_s * 2**retry
                logger.warning(
                    "data: cannot read %s (%s); retry %d of %d in %g s", what, error, retry + 1, self.retries, wait
                )
                time.sleep(wait)
        return attempt()


class Checksums(NamedTuple):
    """What a file was when it was written: its bytes, and the CRC-32 of every piece of it."""

    num_bytes: int
    crc32: list[int]


def checksums(path: Path) -> Checksums:
    """Of a file as it is now; reads all of it, at 2.2 GB/s from memory on one core."""
    found = []
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            found.append(zlib.crc32(piece))
    return Checksums(path.stat().st_size, found)


def verify(path: Path, written: Checksums, patience: Patience, *, content: bool) -> None:
    """DataError unless the file has the bytes that were written; without `content`, unless it has as many."""

    def damaged(what: str) -> DataError:
        return DataError(f"{path}: {what}; delete {path.parent} and it is built again")

    try:
        size = patience.read(str(path), lambda: path.stat().st_size)
        if size != written.num_bytes:
            raise damaged(f"has {size} bytes, but {written.num_bytes} were written")
        if not content:
            return
        if size >= 2**30:
            logger.info("%s: comparing %.1f GB with their checksums", path, size / 1e9)
        found = patience.read(str(path), lambda: checksums(path))
    except OSError as error:
        raise damaged(f"cannot be read ({error.strerror})") from error
    for index, (now, then) in enumerate(zip(found.crc32, written.crc32, strict=False)):
        if now != then:
            raise damaged(f"bytes {index * PIECE} to {min((index + 1) * PIECE, size)} are not what was written")
    if found != written:  # changed while it was read
        raise damaged(f"has {found.num_bytes} bytes, but {written.num_bytes} were written")


class TokenFile:
    """A file of unsigned integers as something to slice; every slice is read anew, from any thread."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger], domain: str, patience: Patience):
        self.dtype = np.dtype(dtype)
        self._path, self._domain, self._patience = path, domain, patience
        self._opened = _Opened(path)
        self._size = os.fstat(self._opened.number).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(self._size)
        wanted, offset = max(0, stop - start) * self.dtype.itemsize, start * self.dtype.itemsize
        try:
            found = os.pread(self._opened.number, wanted, offset)
        except OSError:
            found = b""
        if len(found) < wanted:
            found = self._insist(wanted, offset)
        return np.frombuffer(found, self.dtype)

    def _insist(self, wanted: int, offset: int) -> bytes:
        """The same bytes in as many reads as it takes, with the file opened anew for every attempt."""

        def attempt() -> bytes:
            opened, found = _Opened(self._path), b""
            while len(found) < wanted:  # one read gives 2 GiB at most
                piece = os.pread(opened.number, wanted - len(found), offset + len(found))
                if not piece:
                    size = os.fstat(opened.number).st_size
                    raise OSError(f"ends after {size} bytes, {self._size * self.dtype.itemsize} when it was opened")
                found += piece
            self._opened = opened
            return found

        try:
            return self._patience.read(str(self._path), attempt)
        except OSError as error:
            raise DataError(
                f"{self._path} (domain {self._domain!r}): {error.strerror or error}; unless the disk is to blame,"
                f" delete {self._path.parent} and it is built again"
            ) from error


class _Opened:
    """A file descriptor that is closed once no thread reads through it any more."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
