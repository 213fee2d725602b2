"""Train, or resume:  python -m launch.train CONFIG.py[:function] [--workdir DIR] [--any.field VALUE ...]

    python -m launch.train configs/quickstart.py --workdir runs/a --model.moe.router.num-selected 4
    python -m launch.train configs/quickstart.py --help        every field with its type, default and meaning

The same command again resumes the run in its workdir. Ctrl-C or SIGTERM saves, then exits. Exit status: 0 finished, 2 a
mistake in the config, 3 stopped because the loss was not finite, 128 + n ended by signal n after saving.
"""

import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from launch.cli import load_function, one_line_errors, override
from moe import config as configs
from moe.config import ConfigError

USAGE = "usage: python -m launch.train CONFIG.py[:function] [--workdir DIR] [--field.path VALUE ...]"


class Stop:
    """Remembers the first SIGINT or SIGTERM; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.default_int_handler(number, frame)
        self.signal = number

    def __call__(self) -> bool:
        return self.signal is not None


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or words[0].startswith("-"):
        print(f"{__doc__}\n{USAGE}" if words[:1] in (["-h"], ["--help"]) else f"error: {USAGE}", file=sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    with one_line_errors():
        return _train(words[0], words[1:])


def _train(spec: str, words: list[str]) -> int:
    workdir, words = _take_workdir(spec, words)
    from moe.data import check_inputs
    from moe.train.run import RunConfig
    from moe.train.workdir import check_workdir

    base = load_function(spec)
    if not isinstance(base, RunConfig):
        raise ConfigError(f"config = {spec!r}: must return a RunConfig, got {type(base).__name__}")
    config = override(base, words, f"python -m launch.train {spec}")
    check_workdir(workdir, config)
    check_inputs(config.data)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("absl", "orbax", "jax"):  # what they warn of at every save is no news to who runs this
        logging.getLogger(chatty).setLevel(logging.ERROR)

    from moe.analysis.evaluation import evaluate_run
    from moe.analysis.report import write_report
    from moe.train.failures import NotFinite
    from moe.train.loop import train

    stop = Stop()
    record = {"config_file": spec, "changes": configs.diff(base, config), "command_line": words}
    try:
        outcome = train(config, workdir, should_stop=stop, record=record)
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if not outcome.finished:
        return 128 + (stop.signal or 0)
    evaluate_run(workdir)
    print(f"report: {write_report(workdir)}")
    return 0


def _take_workdir(spec: str, words: list[str]) -> tuple[Path, list[str]]:
    """The value of --workdir (default: runs/NAME of the config file) and the other words."""
    name = spec.replace(".py", "").replace(":", "_")
    workdir, rest = Path("runs") / Path(name).name, list(words)
    for index, word in enumerate(words):
        if word == "--workdir":
            if index + 1 == len(words) or words[index + 1].startswith("--"):
                raise ConfigError("workdir: --workdir needs a folder")
            workdir, rest = Path(words[index + 1]), words[:index] + words[index + 2 :]
        elif word.startswith("--workdir="):
            workdir, rest = Path(word.partition("=")[2]), words[:index] + words[index + 1 :]
    return workdir, rest


if __name__ == "__main__":
    sys.exit(main())
