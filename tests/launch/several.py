"""Real launches of several processes that find each other by MOE_*; simulated devices, one port."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.launch.runs import environment
from tests.multiprocess.together import free_port

ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass
class Ended:
    """How a process ended and what it said."""

    status: int
    said: str
    seconds: float


def place(process: int, processes: int, port: int) -> dict[str, str]:
    """What `launch.submit local` would set."""
    return {
        "MOE_COORDINATOR": f"127.0.0.1:{port}",
        "MOE_NUM_PROCESSES": str(processes),
        "MOE_PROCESS_ID": str(process),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def start(words: Sequence[str], more: Mapping[str, str], text: Path, devices: int, cwd: Path = ROOT):  # type: ignore[no-untyped-def]
    """One process of `python -m WORDS`."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env=environment(text, devices) | {"PYTHONPATH": str(ROOT)} | dict(more),
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen[str]], limit_s: float = 300) -> list[Ended]:
    """Waits for all of them; none outlives the call."""
    begin, ends = time.monotonic(), []
    try:
        for process in processes:
            said, _ = process.communicate(timeout=max(0.1, begin + limit_s - time.monotonic()))
            ends.append(Ended(process.returncode, said, time.monotonic() - begin))
    finally:
        for process in processes:
            process.kill()
    return ends


def together(words: Sequence[str], text: Path, processes: int, devices: int) -> list[Ended]:
    """The same command on every process, `devices` each."""
    port = free_port()
    return finish([start(words, place(index, processes, port), text, devices) for index in range(processes)])
