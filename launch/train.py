"""Train, or resume:  python -m launch.train CONFIG.py[:function] [--workdir DIR] [--any.field VALUE ...]

    python -m launch.train configs/quickstart.py --workdir runs/a --model.moe.router.num-selected 4
    python -m launch.train configs/quickstart.py --help        every field with its type, default and meaning

The same command again resumes the run in its workdir. Ctrl-C or SIGTERM saves, then exits.

Several processes of one run find each other by what their scheduler tells (SLURM, Open MPI, TPU), by the variables
MOE_COORDINATOR, MOE_NUM_PROCESSES and MOE_PROCESS_ID (`launch.submit` sets them), or by the options
--coordinator HOST:PORT --processes N --process I.

Exit status: 0 finished, 1 an error or a process that was lost, 2 a mistake in the config or in how it was started, 3
the numbers went wrong, 74 the disk is full or unreadable, 75 saved and ended on SIGTERM: start it again, 76 ended by
the watchdog, 130 saved and ended on Ctrl-C.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import exits, places
from launch.cli import load_function, one_line_errors, override, take
from launch.stop import Stop
from moe import config as configs
from moe.cluster.config import ClusterConfig
from moe.cluster.place import Place
from moe.config import ConfigError

USAGE = "usage: python -m launch.train CONFIG.py[:function] [--workdir DIR] [--field.path VALUE ...]"
_TELL_S = 20.0
"""Seconds that a process with a mistake waits for the others, to tell them."""


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or words[0].startswith("-"):
        print(f"{__doc__}\n{USAGE}" if words[:1] in (["-h"], ["--help"]) else f"error: {USAGE}", file=sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else exits.MISTAKE
    with one_line_errors():
        own, rest = take(words[1:], ("workdir", *places.FLAGS))
        place = places.find(own, os.environ)
    with _ends_at_once(place), one_line_errors():
        return _train(words[0], rest, Path(own.get("workdir") or default_workdir(words[0])), place)


def default_workdir(spec: str) -> Path:
    """runs/NAME of the config file."""
    return Path("runs") / Path(spec.replace(".py", "").replace(":", "_")).name


@contextlib.contextmanager
def _ends_at_once(place: Place | None) -> Iterator[None]:
    """One of several processes that fails must not wait for the others at its exit: they wait for it."""
    try:
        yield
    except BaseException as error:
        if place is None:
            raise
        status = error.code if isinstance(error, SystemExit) else exits.FAILED
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else exits.FAILED)


def _train(spec: str, words: list[str], workdir: Path, place: Place | None) -> int:
    base, config = _configured(spec, words, workdir, place)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("absl", "orbax", "jax"):  # what they warn of at every save is no news to who runs this
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a save that failed is one line of ours
    if place is not None and place.process_id != 0:
        logging.getLogger().setLevel(logging.WARNING)

    from launch.facts import facts
    from moe.analysis.evaluation import evaluate_run
    from moe.analysis.report import write_report
    from moe.cluster.group import join
    from moe.train.loop import train

    stop = Stop(alone=place is None)
    group = join(place, config.cluster, facts(config, workdir) if place is not None else {})
    record = {"config_file": spec, "changes": configs.diff(base, config), "command_line": words}
    on_stall = lambda: os._exit(exits.STALLED)  # noqa: E731
    outcome = train(config, workdir, group=group, should_stop=stop, record=record, on_stall=on_stall)
    if not outcome.finished:
        group.leave()
        return stop.status
    if place is None or place.process_id == 0:
        evaluate_run(workdir)
        print(f"report: {write_report(workdir)}")
    group.leave()
    return exits.FINISHED


def _configured(spec: str, words: list[str], workdir: Path, place: Place | None) -> tuple[Any, Any]:
    """The config of the file and the one with the command line's changes; a mistake is told to the other processes."""
    from moe.data import check_inputs
    from moe.train.run import RunConfig
    from moe.train.workdir import check_workdir

    timeout_s = min(_TELL_S, ClusterConfig().start_timeout_s)
    try:
        base = load_function(spec)
        if not isinstance(base, RunConfig):
            raise ConfigError(f"config = {spec!r}: must return a RunConfig, got {type(base).__name__}")
        config = override(base, words, f"python -m launch.train {spec}")
        timeout_s = min(_TELL_S, config.cluster.start_timeout_s)
        check_workdir(workdir, config)
        check_inputs(config.data)
    except ConfigError as mistake:
        if place is not None:
            from moe.cluster.roll_call import Absent, roll_call

            with contextlib.suppress(Absent):  # then it is told to nobody, and said here all the same
                roll_call(place, {}, timeout_s, error=str(mistake))
        raise
    return base, config


if __name__ == "__main__":
    sys.exit(main())
