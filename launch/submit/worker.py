"""Runs on a worker of a TPU VM: the job, started again by its exit status (`launch.submit tpu-vm` writes the call):

    python -m launch.submit.worker --workdir DIR [--restarts N] [...] -- COMMAND ...

As `launch.supervise`, but for one of many hosts: the process finds its place by what the TPU tells it.
"""

import dataclasses
import sys
import time
from pathlib import Path

from launch.cli import one_line_errors, parse
from launch.restarts import RestartConfig
from launch.supervise import Group, Signals, supervise
from moe.config import ConfigError, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerConfig(RestartConfig):
    """One host's process of a run."""

    workdir: str
    """Folder of the run; a newer checkpoint in it is progress."""


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    with one_line_errors():
        if "--" not in words or words[-1] == "--":
            raise ConfigError("command: is missing; python -m launch.submit.worker --workdir DIR -- COMMAND ...")
        split = words.index("--")
        config, command = parse(WorkerConfig, words[:split], "python -m launch.submit.worker"), words[split + 1 :]
        check(config)
    signals = Signals()
    signals.listen()

    def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        while signals.first is None and time.monotonic() < end:
            time.sleep(0.05)

    return supervise(config, Path(config.workdir), lambda: Group(command, [{}]), signals, pause)


if __name__ == "__main__":
    sys.exit(main())
