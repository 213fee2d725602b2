"""Metrics on disk: `metrics.jsonl`, the source of truth for every plot, and TensorBoard events beside it.

A field that is a time or a rate is named `time/...`; everything else is bit-reproducible, so two runs can be compared
line by line once the `time/` fields are left out.
"""

import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from moe.train.storage import storage_errors

JSONL_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"

Metric = float | int | list[float] | list[int]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Writes one record a step to `workdir/metrics.jsonl` and `workdir/tensorboard`; made on process 0 only.

    `resume_step = n` is the last step that the restored state holds (0: nothing yet). Records after it belong to
    steps that will run again: they are cut from the JSONL file, with the torn last line of a killed run, and
    TensorBoard is told to purge from n + 1. So no step is doubled; and none is missing as long as the record of
    step n is written before the checkpoint of step n is committed.

    Every `write` has reached the operating system when it returns: kill -9 loses at most the line in progress.

    Raises: ValueError for a JSONL file that is damaged elsewhere than in its last line; StorageError where the disk
    is full or not writable, in `write` too: the file then holds whole lines and no piece of another.
    """

    def __init__(self, workdir: Path, *, resume_step: int) -> None:
        self._workdir = workdir
        with storage_errors(f"no metrics can be written after step {resume_step}", workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            path = workdir / JSONL_NAME
            self._last_step = _cut(path, resume_step) if path.exists() else None
            self._jsonl = path.open("ab", buffering=0)
            self._events = _EventFile(workdir / TENSORBOARD_NAME)
            self._events.add(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Appends the record of `step`; lists (one value a layer) become TensorBoard scalars `name/layer_0`, ...

        Values are Python numbers, 0-d or 1-d arrays, or lists. A float32 is written with all its bits (as the shortest
        decimal of the equal float64); nan, inf and -inf are written as strings, since JSON has no word for them.

        Raises: ValueError for a step that is not after the last one written, or a metric named `step`;
        TypeError for a value that is not a number or a flat list of them.
        """
        step = int(step)
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step = {step}: must be above {self._last_step}, the last step written")
        if "step" in metrics:
            raise ValueError("metrics['step']: the step is an argument of its own, not a metric")
        plain = {name: _plain(name, metrics[name]) for name in sorted(metrics)}
        record = {"step": step} | {name: _encode(value) for name, value in plain.items()}
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(plain)]
        with storage_errors(f"the metrics of step {step} are not written", self._workdir):
            _append(self._jsonl, (json.dumps(record, allow_nan=False) + "\n").encode("ascii"))
            self._last_step = step
            self._events.add(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._jsonl.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, non-finite values as floats again; a torn last line is left out.

    Raises: ValueError, with file and line, for damage anywhere else.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (line without its newline, decoded record)."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        torn = number == len(lines)  # every complete line ends in a newline, so the last piece is empty or torn
        try:
            record = {name: _decode(value) for name, value in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            if torn:
                return
            raise ValueError(f"{path}:{number}: not a metrics record: {line[:60]!r}") from error
        yield line, record


def _cut(path: Path, resume_step: int) -> int | None:
    """Keeps the records up to `resume_step`, byte for byte, and returns the last step kept (None: no record is)."""
    kept = [(line, record["step"]) for line, record in _lines(path) if record["step"] <= resume_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="ascii") as file:
        file.writelines(line + "\n" for line, _ in kept)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
    temporary.replace(path)
    return max((step for _, step in kept), default=None)


def _append(file: FileIO, data: bytes) -> None:
    """All of `data` at the end of the file, or nothing and OSError."""
    end = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):  # the last bytes of a disk take a piece, and the next call says that it is full
            written += file.write(data[written:])
    except OSError:
        file.truncate(end)
        raise


def _plain(name: str, value: Any) -> Any:
    array = np.asarray(value)
    if array.ndim > 1 or array.dtype.kind not in "iuf":
        raise TypeError(f"metrics[{name!r}] = {value!r}: must be a number or a flat list of numbers")
    return array.tolist()


def _encode(value: Any) -> Any:
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value if math.isfinite(value) else str(value)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE[value] if isinstance(value, str) else value


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{name}/layer_{layer}", item) for layer, item in enumerate(value))
        else:
            yield name, value


class _EventFile:
    """A TensorBoard event file, one unbuffered write an event.

    Not tensorboardX's `SummaryWriter`, for two measured reasons: it hands events to another thread, so a kill loses up
    to two minutes of them, and it names its file by the second, so a run that is resumed within the second truncates
    the events of the run before it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, and a purge acts on what was read before it.
        number = len(list(folder.glob("events.out.tfevents.*")))
        path = folder / f"events.out.tfevents.{int(time.time()):010d}.{number:06d}.{socket.gethostname()}"
        self._file = path.open("xb", buffering=0)
        self.add(Event(file_version="brain.Event:2"))

    def add(self, event: Event) -> None:
        """Appends one record of the TFRecord format: length, its checksum, payload, its checksum."""
        event.wall_time = time.time()
        payload = event.SerializeToString()
        length = struct.pack("<Q", len(payload))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, payload)]
        _append(self._file, length + checksums[0] + payload + checksums[1])

    def close(self) -> None:
        self._file.close()
