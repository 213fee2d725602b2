"""A full disk is one clear error, nothing that was saved is lost, and the same command goes on once there is room."""

import errno
import gc
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.train.checkpoint import Checkpoints
from moe.train.failures import StorageError
from moe.train.metrics import MetricWriter, read_metrics
from moe.train.run import CheckpointConfig
from moe.train.storage import storage_errors
from tests.train.small_state import make, placed
from tests.train.test_checkpoint import NEW, OLD, WHERE, data, restored, save

# Of the writes that fail, Orbax asks one what went wrong; the others say at the end that nobody did.
LEFT_ALONE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; a state takes about 40."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no small disk")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        gc.collect()  # see LEFT_ALONE
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all the room but so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        file.write(b"x" * (shutil.disk_usage(disk).free - leave))
    return filler


@LEFT_ALONE
def test_a_full_disk_is_one_clear_error_and_what_was_saved_stays(small_disk: Path) -> None:
    workdir = small_disk / "run"
    save(workdir, OLD)
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep_last=1))
    assert checkpoints.restore_newest(make, WHERE) is not None
    filler = fill(small_disk, 30_000)
    checkpoints.save(NEW, placed(NEW, WHERE), data(NEW), None)  # goes on behind the steps
    with pytest.raises(StorageError) as caught:
        checkpoints.save(NEW + 1, placed(NEW + 1, WHERE), data(NEW + 1), None)
    assert f"checkpoint {NEW} is not saved: No space left on device ({workdir}: " in str(caught.value)
    assert f"the checkpoints of the steps {OLD} are whole; make room, then" in str(caught.value)
    checkpoints.close()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(OLD)], "leftovers take up room"
    filler.unlink()
    assert restored(workdir) == (OLD, {})
    assert restored(workdir) == (NEW, {})


@LEFT_ALONE
def test_a_save_that_failed_last_is_told_at_the_end(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "run", CheckpointConfig())
    assert checkpoints.restore_newest(make, WHERE) is None
    checkpoints.save(OLD, placed(OLD, WHERE), data(OLD), None)
    checkpoints.save(OLD + 1, placed(OLD, WHERE), data(OLD), None)
    checkpoints.restore(OLD, make, WHERE)  # waits for both
    fill(small_disk, 30_000)
    checkpoints.save(NEW, placed(NEW, WHERE), data(NEW), None)
    with pytest.raises(StorageError, match="steps 3, 4 are whole"):
        checkpoints.close()


def test_metrics_on_a_full_disk_stay_whole_lines(small_disk: Path) -> None:
    workdir = small_disk / "run"
    with MetricWriter(workdir, resume_step=0) as writer:
        writer.write(1, {"loss": 1.5})
        filler = fill(small_disk)
        with pytest.raises(StorageError, match=r"the metrics of step [0-9]+ are not written: No space left"):
            for step in range(2, 300):  # until the page of the file is full
                writer.write(step, {"loss": 1.0 / step})
    text = (workdir / "metrics.jsonl").read_bytes()
    assert text.endswith(b"}\n")
    with pytest.raises(StorageError, match="no metrics can be written after step 1"):
        MetricWriter(workdir, resume_step=1)
    filler.unlink()
    with MetricWriter(workdir, resume_step=1) as writer:
        writer.write(2, {"loss": 0.5})
    assert [record["step"] for record in read_metrics(workdir / "metrics.jsonl")] == [1, 2]


class FullAfter(io.FileIO):
    """A file on a disk with so much room left."""

    room = 0

    def write(self, raw: bytes) -> int:  # type: ignore[override]
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken, self.room = min(self.room, len(raw)), self.room - min(self.room, len(raw))
        return super().write(raw[:taken])


@pytest.mark.parametrize("room", [0, 1, 9])
def test_a_line_that_fits_in_part_is_taken_back(room: int, tmp_path: Path) -> None:
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {"loss": 1.5})
        writer._jsonl.close()
        writer._jsonl = FullAfter(tmp_path / "metrics.jsonl", "ab")
        writer._jsonl.room = room
        with pytest.raises(StorageError, match="step 2 are not written: No space left"):
            writer.write(2, {"loss": 0.5})
        writer._jsonl.room = 1000
        writer.write(2, {"loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 0.25}\n'


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no route"), storage_errors("nothing", tmp_path):
        raise OSError(errno.EHOSTUNREACH, "no route")
    cause = OSError(errno.EIO, os.strerror(errno.EIO))
    words = r"^it: Input/output error .*no checkpoint was saved yet"
    with pytest.raises(StorageError, match=words), storage_errors("it", tmp_path):
        raise RuntimeError("while writing") from cause
