"""Two processes cannot train in one folder; the lock outlives nobody, and a start cut off leaves a usable folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs import debug
from moe.config import ConfigError
from moe.train.lock import Lock, is_held
from moe.train.workdir import LOCK_NAME, check_workdir, open_workdir

# As `Lock` takes it, without what importing the package costs.
HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, b"pid 1 on elsewhere\\n")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_held(path)
        with pytest.raises(ConfigError, match="another process \\(pid 1 on elsewhere\\) trains here"):
            open_workdir(tmp_path, debug.get_config(), {})
        assert not (tmp_path / "config.json").exists(), "the refused process wrote in the folder"
        holder.send_signal(signal.SIGKILL)
    assert not is_held(path)
    lock = open_workdir(tmp_path, debug.get_config(), {})
    assert is_held(path) and f"pid {os.getpid()} on " in path.read_text()
    lock.close()
    lock.close()
    assert not is_held(path) and not is_held(tmp_path / "none")


def test_a_lock_that_is_dropped_is_let_go(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock", "here", "is busy")
    with pytest.raises(ConfigError, match=f"here: another process \\(pid {os.getpid()}"):
        Lock(tmp_path / "lock", "here", "is busy")
    del lock
    Lock(tmp_path / "lock", "here", "is busy").close()


def test_a_start_that_was_cut_off_leaves_a_folder_that_the_next_one_takes(tmp_path: Path) -> None:
    for name in (LOCK_NAME, "config.json.partial", "run.json", "run.json.partial"):
        (tmp_path / name).write_text("{}")
    check_workdir(tmp_path, debug.get_config())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        check_workdir(tmp_path, debug.get_config())
