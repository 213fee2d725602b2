"""Several processes as one: started together, ended together."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests import conftest

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(module: str, processes: int, devices: int, folder: Path, words: Sequence[str] = ()) -> None:
    """`python -m MODULE PORT INDEX FOLDER *words` for every index; `devices` in all. AssertionError if one fails."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": conftest.CHEAP,
    }
    port = str(free_port())
    logs = [folder / f"{index}.log" for index in range(processes)]
    started = []
    for index, log in enumerate(logs):
        command = [sys.executable, "-m", module, port, str(index), str(folder), *words]
        with log.open("wb") as out:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    try:
        finish(started, LIMIT_S)
    except (RuntimeError, TimeoutError) as error:
        said = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
        raise AssertionError(f"{error}\n{said}") from error


def finish(processes: list[subprocess.Popen[bytes]], limit_s: float) -> None:
    """Waits until all have ended well; else, and if time is up, ends every one of them and raises."""
    end = time.monotonic() + limit_s
    try:
        while None in (codes := [process.poll() for process in processes]) or any(codes):
            if any(codes):
                raise RuntimeError(f"a process failed: exit statuses {codes}")
            if time.monotonic() > end:
                raise TimeoutError(f"not done after {limit_s} s: exit statuses {codes}")
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
