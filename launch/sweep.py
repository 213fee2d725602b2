"""Run a sweep, or go on with it:  python -m launch.sweep SPEC.py[:function] [--workdir DIR] [--workers N] ...

    python -m launch.sweep configs/sweeps/routers.py --dry-run True          what would run, and what is finished
    python -m launch.sweep configs/sweeps/routers.py --workers 4 --only "top_k*" switch
    python -m launch.sweep configs/sweeps/routers.py --backend slurm --slurm.at-once 8

The spec is a Python file whose `get_sweep` returns a `moe.sweep.Sweep`. Each run trains in WORKDIR/NAME/seed-N, started
by `launch.train`, as if by hand. The same command again skips what is finished, resumes what was interrupted and tries
again what failed. A run that fails does not stop the others. The report over all is written at the end, and at any time
by `python -m launch.report WORKDIR`. Ctrl-C or SIGTERM lets the runs save and ends.

Exit status: 0 all runs are finished, 1 some failed, 2 a mistake in the spec or on the command line (nothing was
started), 75 ended on SIGTERM, 130 on Ctrl-C.
"""

import ast
import dataclasses
import fnmatch
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from launch import exits
from launch.cli import load_function, one_line_errors, parse
from launch.supervise import Signals
from launch.sweeps.array import ArrayConfig, submit
from launch.sweeps.local import LocalConfig, Pool, make_workers
from launch.sweeps.rows import Display, Row
from moe.config import ConfigError, at_least, check
from moe.sweep import Sweep, SweepRun
from moe.sweep.folder import LOCK, config_path, is_finished, log_path, write_manifest
from moe.train.load import CONFIG_NAME
from moe.train.lock import Lock
from moe.train.workdir import check_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run every variant of a sweep with every seed."""

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """Python file with `get_sweep`, or FILE.py:function."""
    workdir: str | None = None
    """Folder of the sweep; runs/NAME of the spec if not given."""
    only: tuple[str, ...] = ()
    """Patterns (* and ?) of the variants or runs (NAME/seed-N) to run; all of them if not given."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of those of the spec."""
    set: tuple[str, ...] = ()
    """PATH=VALUE, changes of every config, with a Python literal: `--set steps=100 model.moe.num_experts=4`."""
    workers: int = 1
    """Runs at the same time on this machine."""
    backend: Literal["local", "slurm"] = "local"
    """Processes on this machine, or one array job of SLURM."""
    dry_run: bool = False
    """Say what would be run and submitted, and stop."""
    local: LocalConfig = LocalConfig()
    slurm: ArrayConfig = ArrayConfig()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, workers=1)
        if self.backend == "slurm" and self.workers != 1:
            yield "workers", "is ignored with backend = slurm; slurm.at-once is its bound"
        unused = "slurm" if self.backend == "local" else "local"
        given = getattr(self, unused)
        for field in dataclasses.fields(given):
            if getattr(given, field.name) != field.default:
                yield f"{unused}.{field.name}", f"is ignored with backend = {self.backend}"


def main(words: list[str] | None = None) -> int:
    with one_line_errors():
        arguments = parse(Arguments, words, "python -m launch.sweep")
        check(arguments)
        spec = arguments.spec
        sweep = load_function(spec, "get_sweep")
        if not isinstance(sweep, Sweep):
            raise ConfigError(f"sweep = {spec!r}: must return a Sweep, got {type(sweep).__name__}")
        if arguments.seeds:
            sweep = dataclasses.replace(sweep, seeds=arguments.seeds)
        runs = sweep.runs([_change(text) for text in arguments.set])
        root = Path(arguments.workdir or Path("runs") / Path(spec.partition(":")[0]).stem)
        chosen = _select(runs, arguments.only)
        _check(root, chosen)
        rows = [_row(root, run) for run in chosen]
        commands = {run.folder: _command(root, run) for run in chosen}
        if arguments.backend == "slurm":
            left = [row.folder for row in rows if row.state == "waiting"]
            return submit(
                root,
                left,
                arguments.slurm,
                arguments.slurm.dry_run or arguments.dry_run,
                lambda: _open(root, sweep, runs),
            )
        if arguments.dry_run:
            return _tell(rows, commands)
        workers = make_workers(arguments.workers, arguments.local, os.environ)
        lock = _open(root, sweep, runs)
    signals = Signals()
    signals.listen()
    with Display(rows) as display:
        Pool(root, rows, commands, workers, arguments.local).run(signals, display)
    _report(root)
    lock.close()
    for row in rows:
        if row.state == "failed":
            print(f"failed: {row.folder}: {row.message} (see {log_path(root, row.folder)})", file=sys.stderr)
    if any(row.state == "waiting" for row in rows):
        return signals.status
    return exits.FAILED if any(row.state == "failed" for row in rows) else exits.FINISHED


def _change(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"set = {text!r}: must be PATH=VALUE")
    try:
        return path, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return path, value  # a word without quotes


def _select(runs: Sequence[SweepRun], only: Sequence[str]) -> list[SweepRun]:
    for pattern in only:
        if not any(_matches(run, pattern) for run in runs):
            names = dict.fromkeys(run.name for run in runs)
            raise ConfigError(f"only = {pattern!r}: matches none of {', '.join(names)}")
    return [run for run in runs if not only or any(_matches(run, pattern) for pattern in only)]


def _matches(run: SweepRun, pattern: str) -> bool:
    return fnmatch.fnmatchcase(run.name, pattern) or fnmatch.fnmatchcase(run.folder, pattern)


def _check(root: Path, runs: Sequence[SweepRun]) -> None:
    """Whatever can be seen to be wrong before anything runs."""
    from moe.data import check_inputs

    if (root / CONFIG_NAME).is_file():
        raise ConfigError(f"workdir = '{root}': holds a run, so it cannot hold a sweep; name another")
    for run in runs:
        check_workdir(root / run.folder, run.config)
    seen = []
    for run in runs:
        if run.config.data not in seen:
            seen.append(run.config.data)
            check_inputs(run.config.data)


def _row(root: Path, run: SweepRun) -> Row:
    done = is_finished(root / run.folder, run.config.steps)
    return Row(root, run.folder, run.config.steps, "done" if done else "waiting")


def _command(root: Path, run: SweepRun) -> tuple[str, ...]:
    """The saved config is what runs: a spec that is edited meanwhile changes nothing."""
    saved = str(config_path(root, run.folder))
    return (sys.executable, "-m", "launch.train", saved, "--workdir", str(root / run.folder))


def _tell(rows: Sequence[Row], commands: dict[str, tuple[str, ...]]) -> int:
    for row in rows:
        print(
            f"{row.folder}: {'finished' if row.state == 'done' else shlex.join(('python', *commands[row.folder][1:]))}"
        )
    return exits.FINISHED


def _open(root: Path, sweep: Sweep, runs: Sequence[SweepRun]) -> Lock:
    """The sweep's folder with its manifest, for this process alone."""
    (root / LOCK).parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(root / LOCK, f"workdir = '{root}'", "drives this sweep")
    write_manifest(root, sweep.baseline, runs)
    return lock


def _report(root: Path) -> None:
    from launch import report  # draws, which the checks before need not wait for

    report.main([str(root)])


if __name__ == "__main__":
    sys.exit(main())
