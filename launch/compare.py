"""Train every variant of a config file and write a table:  python -m launch.compare --configs configs/routers.py

    python -m launch.compare --configs configs/routers.py --workdir runs/routers --page docs/results/routers.md
    python -m launch.compare --configs configs/routers.py --only topk switch --steps 100

A variant is a public function of the file. Each runs in a process of its own in WORKDIR/NAME-seedN; the same command
again skips what is finished and resumes what was interrupted, and refuses a folder that holds a run of another config.
A variant that fails is named in the table and does not stop the others. All variants of one seed run before the next
seed.
"""

import dataclasses
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from launch.cli import load_functions, one_line_errors, parse
from moe.analysis.comparison import Row, is_finished, read_row, table
from moe.config import ConfigError
from moe.train.workdir import check_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train every variant of a config file and write a table."""

    configs: str
    """Config file; each public function in it is a variant."""
    workdir: str = "runs/compare"
    """Where the runs go, one folder for each variant and seed."""
    page: str | None = None
    """Markdown file for the table; only printed if not given."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, each of them for every variant."""
    only: tuple[str, ...] = ()
    """Variants to run; all of them if not given."""
    remark: str = ""
    """A sentence for the page: what a reader should know of this machine or this run."""
    steps: int | None = None
    """Optimizer steps of every run; what the config says if not given."""


def main(words: list[str] | None = None) -> int:
    with one_line_errors():
        arguments = parse(Arguments, words, "python -m launch.compare")
        variants = load_functions(arguments.configs)
        if unknown := [name for name in arguments.only if name not in variants]:
            raise ConfigError(f"only = {unknown[0]!r}: {arguments.configs} has {', '.join(variants)}")
        names = arguments.only or tuple(variants)
        pairs = [(name, seed) for seed in arguments.seeds for name in names]
        todo = [(name, seed) for name, seed in pairs if not _is_done(arguments, variants[name], name, seed)]
        failed = [f"{name}-seed{seed}" for name, seed in todo if not _train(arguments, name, seed)]
        text = _page(arguments, {name: variants[name] for name in names}, failed)
        print(text)
        if arguments.page is not None:
            Path(arguments.page).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.page).write_text(text)
    return 1 if failed else 0


def _is_done(arguments: Arguments, variant: Callable[[], Any], name: str, seed: int) -> bool:
    """Whether the run is finished; ConfigError if it had another config, which the table must not show as this one."""
    workdir = Path(arguments.workdir) / f"{name}-seed{seed}"
    if not is_finished(workdir):
        return False
    config = dataclasses.replace(variant(), seed=seed)
    check_workdir(workdir, config if arguments.steps is None else dataclasses.replace(config, steps=arguments.steps))
    return True


def _train(arguments: Arguments, name: str, seed: int) -> bool:
    """Runs one variant to its end; its output goes to a log file beside its folder."""
    workdir = Path(arguments.workdir) / f"{name}-seed{seed}"
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launch.train", f"{arguments.configs}:{name}"]
    command += ["--workdir", str(workdir), "--seed", str(seed)]
    command += [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    print(f"{datetime.datetime.now():%H:%M:%S} {name}, seed {seed}", file=sys.stderr, flush=True)
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False).returncode == 0


def _page(arguments: Arguments, variants: dict[str, object], failed: list[str]) -> str:
    notes = {name: (variant.__doc__ or "").strip().partition("\n\n")[0] for name, variant in variants.items()}
    notes = {name: " ".join(note.split()) for name, note in notes.items()}
    rows: dict[str, list[Row]] = {}
    for name in variants:
        workdirs = [Path(arguments.workdir) / f"{name}-seed{seed}" for seed in arguments.seeds]
        if found := [read_row(workdir) for workdir in workdirs if is_finished(workdir)]:
            rows[name] = found
    command = f"python -m launch.compare --configs {arguments.configs} --workdir {arguments.workdir}"
    command += f" --seeds {' '.join(map(str, arguments.seeds))}"
    command += f" --only {' '.join(arguments.only)}" if arguments.only else ""
    command += f" --steps {arguments.steps}" if arguments.steps is not None else ""
    command += f" --page {arguments.page}" if arguments.page is not None else ""
    lines = [
        f"# {Path(arguments.configs).stem}, compared",
        "",
        f"Written by `{command}` on {datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}),"
        f" Python {platform.python_version()}, jax {jax.__version__}.",
        "",
        *table(rows, notes),
        "",
        "Held-out bits/byte: mean over domains and seeds, ± half the range over seeds; max violation E max(f) - 1, mean"
        " over layers and the last 50 steps; dead: experts with less than 1 % of their share, summed over layers, same"
        " steps; step: 10th percentile of a run, the smallest over seeds.",
    ]
    if arguments.remark:
        lines += ["", arguments.remark]
    if failed:
        lines += ["", f"Did not finish: {', '.join(failed)}; see the logs in {arguments.workdir}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
