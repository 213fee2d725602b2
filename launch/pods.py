"""Compile the published models for the pods they are laid out for, and write the table:  python -m launch.pods

    python -m launch.pods --workdir runs/pods --page docs/results/pods.md [--only paper_43b] [--dropless True]

Every model of configs/reference.py is compiled for its topology in a process of its own (`launch.compile`), and the
planner's memory and step time (`launch.plan`) stand beside what the compiler says. What is in WORKDIR already, for the
same config, is not compiled again; a model that fails or does not fit is named and does not stop the others.
"""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from configs import reference
from launch.cli import load_functions, one_line_errors, parse
from launch.plan import workload
from moe.config import ConfigError, fingerprint
from moe.plan import count, topology
from moe.plan.search import judge
from moe.train.run import RunConfig

GIB = 1 << 30
LAID_OUT = ("misplaced", "gathered", "unexpected")
"""What `launch.compile` finds wrong with how a program lies on the devices."""
ROWS = (
    "| model | parameters, active | chips | layout | A | state | at most | predicted | of the chip | step at peak |"
    " predicted step | all-to-all | all else sent | compiled in |"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compile the published models for their pods and write a table."""

    workdir: str = "runs/pods"
    """Where the numbers of each model go."""
    page: str | None = None
    """Markdown file for the table; only printed if not given."""
    only: tuple[str, ...] = ()
    """Models; all that have a topology if not given."""
    dropless: bool = False
    """Compile with buffers that hold the worst case."""


def main(words: list[str] | None = None) -> int:
    with one_line_errors():
        arguments = parse(Arguments, words, "python -m launch.pods")
        models = load_functions(reference.__file__)
        if unknown := [name for name in arguments.only if name not in reference.TOPOLOGIES]:
            raise ConfigError(f"only = {unknown[0]!r}: there are {', '.join(reference.TOPOLOGIES)}")
        names = arguments.only or tuple(reference.TOPOLOGIES)
        rows, failed, odd = [], [], []
        for name in names:
            config = models[name]()
            assert isinstance(config, RunConfig)
            found = _compiled(arguments, name, config)
            if found is None:
                failed.append(name)
            else:
                rows.append(_row(name, config, found))
                failed += [] if found["fits"] else [name]
                odd += [f"{name}: {line}" for what in LAID_OUT for line in found[what]]
        text = _page(arguments, rows, failed, odd)
        print(text)
        if arguments.page is not None:
            Path(arguments.page).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.page).write_text(text)
    return 1 if failed or odd else 0


def _compiled(arguments: Arguments, name: str, config: RunConfig) -> dict[str, Any] | None:
    """What `launch.compile` says of the model; None if it fails, for which see the log in the workdir."""
    folder = Path(arguments.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'-dropless' * arguments.dropless}.json"
    if path.is_file() and (found := json.loads(path.read_text()))["fingerprint"] == fingerprint(config):
        return found
    print(f"{datetime.datetime.now():%H:%M:%S} {name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "launch.compile", f"configs/reference.py:{name}"]
    command += ["--topology", reference.TOPOLOGIES[name], "--json", str(path)]
    command += ["--dropless"] * arguments.dropless
    path.unlink(missing_ok=True)
    with path.with_suffix(".log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=False)
    if not path.is_file():
        return None
    found = json.loads(path.read_text()) | {"fingerprint": fingerprint(config)}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _row(name: str, config: RunConfig, found: dict[str, Any]) -> str:
    asked = topology.parse(reference.TOPOLOGIES[name])
    plan = judge(workload(config, asked.num_devices), asked.chip)
    parameters = count(config.model)
    mesh = " ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1 and axis != "expert_data")
    rows = sum(one["bytes"] for one in found["collectives"] if one["kind"] == "all-to-all")
    rest = sum(one["bytes"] for one in found["collectives"]) - rows
    cells = [
        f"`{name}`", f"{parameters.total / 1e9:.1f}B, {parameters.active / 1e9:.1f}B", found["topology"], mesh,
        str(config.accumulation), f"{found['memory']['state'] / GIB:.2f}", f"{found['peak_bytes'] / GIB:.2f}",
        f"{plan.memory.total / GIB:.2f} ({plan.memory.total / found['peak_bytes'] - 1:+.1%})",
        f"{found['peak_bytes'] / found['limit_bytes']:.0%}", f"{found['best_step_s']:.2f}", f"{plan.seconds:.2f}",
        f"{rows / 1e9:.1f}", f"{rest / 1e9:.1f}", f"{found['compile_s'] + found['lower_s']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _page(arguments: Arguments, rows: list[str], failed: list[str], odd: list[str]) -> str:
    command = f"python -m launch.pods --workdir {arguments.workdir}"
    command += f" --only {' '.join(arguments.only)}" if arguments.only else ""
    command += " --dropless True" if arguments.dropless else ""
    command += f" --page {arguments.page}" if arguments.page is not None else ""
    lines = [
        "# Published models on the pods they are laid out for" + ", dropping nothing" * arguments.dropless,
        "",
        f"Written by `{command}` on {datetime.date.today()}: compiled ahead of time by the real compiler of the chip"
        f" on {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, jax"
        f" {jax.__version__}. Nothing was run on an accelerator.",
        "",
        ROWS,
        "|---|---|---|---|" + "---:|" * (ROWS.count("|") - 5),
        *rows,
        "",
        "Sequences of 4096 tokens, at least 1024 of them a step, in A micro-batches. Memory in GiB of one device: train"
        " state, the most that exists at once as compiled, and as the planner predicts it (and by how much it is off)."
        " Seconds a step: at the chips' peak rate with nothing else to do, and as the planner predicts it. Sent: GB of"
        " one device in a step. The last column is seconds on this machine.",
    ]
    checked = (
        "of each it was checked that every leaf of the train state lies as the table of axes says, that no stack of"
        " weights is gathered for all layers at once, and that the layout explains every collective but all-reduces"
    )
    lines += ["", f"Layout: {checked}." if not odd else f"Layout: {checked}; these are not:"]
    lines += [f"- {line}" for line in odd]
    if failed:
        lines += ["", f"Does not fit, or did not compile: {', '.join(failed)}; see the logs in {arguments.workdir}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
