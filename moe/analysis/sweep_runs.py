"""Runs of a sweep, or any run folders, read and grouped: variants are what has the same config but for the seed."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe import config as configs
from moe.analysis.run_files import ReportError, read_json
from moe.config import ConfigError
from moe.plan.flops import train_flops_per_token
from moe.sweep.folder import config_path, is_finished, read_end, read_manifest
from moe.train.load import CONFIG_NAME
from moe.train.metrics import JSONL_NAME, read_metrics
from moe.train.run import RunConfig
from moe.train.workdir import MAY_CHANGE

TAIL = 50
"""Steps at the end of a run over which its balance is averaged."""
_UNREADABLE = (ConfigError, ValueError, AttributeError, ImportError, TypeError, KeyError)
"""What the config of another version of this code raises when it is loaded."""


class OneRun(NamedTuple):
    """A run, finished or not."""

    folder: Path
    name: str
    """Of its variant."""
    seed: int
    note: str
    state: str
    """`finished`, or why it is not in the statistics."""
    key: str
    """The same for the same config but for the seed; empty where the config could not be read."""
    steps: int
    flops_per_token: int
    summary: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def step(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def tokens(self) -> int:
        return int(self.records[-1].get("tokens", 0)) if self.records else 0

    def value(self, metric: str) -> float:
        """The metric at the end: of the summary, else over the last steps of metrics.jsonl (mean over layers)."""
        if metric in self.summary:
            return float(self.summary[metric])
        return self.tail(metric)

    def tail(self, metric: str, total: bool = False) -> float:
        """Mean over the last steps; over layers their mean, or their sum. nan where it is not logged."""
        over_layers = np.sum if total else np.mean
        found = [float(over_layers(one[metric])) for one in self.records[-TAIL:] if np.size(one.get(metric, []))]
        return float(np.mean(found)) if found else float("nan")

    @property
    def step_s(self) -> float:
        """Seconds of a step: the 10th percentile, since other work on a machine only ever adds."""
        times = sorted(record["time/step_s"] for record in self.records if "time/step_s" in record)
        return times[len(times) // 10] if times else float("nan")


class Runs(NamedTuple):
    """All that was found."""

    runs: list[OneRun]
    baseline: str | None
    """What the sweep compares with."""

    @property
    def finished(self) -> dict[str, list[OneRun]]:
        """Finished runs by variant, those of a variant by seed."""
        found: dict[str, list[OneRun]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            if run.finished:
                found.setdefault(run.name, []).append(run)
        return found

    @property
    def left_out(self) -> list[OneRun]:
        return [run for run in self.runs if not run.finished]


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or (folder / JSONL_NAME).is_file()


def read_runs(folders: Sequence[Path]) -> Runs:
    """Folders of sweeps, of runs, or that hold such, two levels deep; ReportError where there is no run."""
    found: list[OneRun] = []
    baseline = None
    for root in folders:
        if not root.is_dir():
            raise ReportError(f"{root} is not a folder")
        manifest = read_manifest(root)
        known: set[Path] = set()
        if manifest is not None:
            baseline = baseline or manifest.baseline
            known = {root / entry.folder for entry in manifest.runs}
            found += [_of_sweep(root, entry.name, entry.seed, entry.note, entry.steps) for entry in manifest.runs]
        inside = [root] if is_run(root) else [path for path in (*root.glob("*"), *root.glob("*/*")) if is_run(path)]
        others = [_alone(path) for path in sorted(inside) if path not in known]
        if manifest is not None:  # what an earlier form of the sweep left is told, and not mixed in
            others = [run._replace(state="not in the sweep as it was last started") for run in others]
        found += others
    if not found:
        raise ReportError(f"{', '.join(map(str, folders))}: no run in it")
    return Runs(_one_name_each(found), baseline)


def _of_sweep(root: Path, name: str, seed: int, note: str, steps: int) -> OneRun:
    folder = root / name / f"seed-{seed}"
    run = _read(folder, folder / CONFIG_NAME if is_run(folder) else config_path(root, f"{name}/seed-{seed}"))
    run = run._replace(name=name, seed=seed, note=note, steps=steps)
    end = read_end(root, f"{name}/seed-{seed}")
    if not run.finished and run.key and end is not None and end[1]:
        run = run._replace(state=f"{run.state}: {end[1]}")
    return run


def _alone(folder: Path) -> OneRun:
    run = _read(folder, folder / CONFIG_NAME)
    of_seed = re.fullmatch(r"seed-\d+", folder.name)
    return run._replace(name=folder.resolve().parent.name if of_seed else re.sub(r"-seed\d+$", "", folder.name))


def _read(folder: Path, saved: Path) -> OneRun:
    """A run with the config at `saved`; whatever cannot be read becomes its state."""
    empty = OneRun(folder, folder.name, 0, "", "", "", 0, 0, {}, [])
    try:
        config = configs.load(saved)
        if not isinstance(config, RunConfig):
            raise ConfigError(f"{saved} holds no RunConfig")
        flops = train_flops_per_token(config.model, config.data.seq_len)
    except OSError:
        return empty._replace(state="not started")
    except _UNREADABLE as error:
        return empty._replace(state=f"config cannot be read by this version: {error}")
    run = empty._replace(seed=config.seed, key=_key(config), steps=config.steps, flops_per_token=flops)
    if not (folder / JSONL_NAME).is_file():
        return run._replace(state="not started")
    try:
        run = run._replace(records=read_metrics(folder / JSONL_NAME))
    except ValueError as error:
        return run._replace(state=str(error))
    if not is_finished(folder, config.steps):
        return run._replace(state="not finished")
    return run._replace(state="finished", summary=read_json(folder / "summary.json"))


def _key(config: RunConfig) -> str:
    lines = configs.render(dataclasses.replace(config, seed=0)).split("\n")
    return "\n".join(line for line in lines if not line.startswith(MAY_CHANGE))


def _one_name_each(runs: Sequence[OneRun]) -> list[OneRun]:
    """Runs of one config under its first name; different configs of one name under their folders."""
    names: dict[str, str] = {}
    for run in runs:
        if run.key and run.key not in names:
            names[run.key] = str(run.folder) if run.name in names.values() else run.name
    found = [run._replace(name=names.get(run.key, run.name)) for run in runs]
    seen: dict[tuple[str, int], Path] = {}
    for run in found:
        if run.finished and (other := seen.setdefault((run.key, run.seed), run.folder)) != run.folder:
            raise ReportError(
                f"{other} and {run.folder} are the same config with seed {run.seed}: they would count twice; leave one"
                " out"
            )
    return found
