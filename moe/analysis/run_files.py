"""What a run's folder holds for its report, read as raw files: no model, no config class, no device."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.analysis.plots import Array
from moe.analysis.plots_history import Curve
from moe.train.events import read_events
from moe.train.metrics import JSONL_NAME, read_metrics


class ReportError(ValueError):
    """A run folder that no report can be made of; the message is one line."""


class RunFiles(NamedTuple):
    """What was found; empty where a file is missing."""

    records: list[dict[str, Any]]
    evaluation: dict[str, Any]
    config: dict[str, Any]
    start: dict[str, Any]
    """How the run was last started: versions, balance rules."""
    pairs_LEE: Array | None
    events: list[dict[str, Any]]
    """What happened beside training; `moe.train.events`."""

    @property
    def loads(self) -> dict[str, list[Array]]:
        """The load [E_l] of every MoE layer by domain, but for those `unrouted`; empty for a dense model."""
        found = self.by_expert("load")
        return {name: load_L for name, load_L in found.items() if all(load_E.any() for load_E in load_L)}

    @property
    def unrouted(self) -> list[str]:
        """Domains of which some layer gave no token to any expert, so that they have no load there."""
        return [name for name in self.by_expert("load") if name not in self.loads]

    def by_expert(self, key: str) -> dict[str, list[Array]]:
        """Lists [L, E] of every domain, with the experts that a layer does not have left out."""
        found = {}
        for name, domain in self.evaluation.get("domains", {}).items():
            if rows := domain.get(key):
                widths = self.evaluation.get("num_experts", [len(row) for row in rows])
                found[name] = [np.array(row[:E], np.float64) for row, E in zip(rows, widths, strict=True)]
        return found

    @property
    def layers(self) -> list[int]:
        """Where in the model the MoE layers are."""
        found = self.loads
        count = len(next(iter(found.values()))) if found else 0
        return list(self.evaluation.get("load_layers", range(count))) if found else []

    def layers_of(self, curve: Curve) -> list[int]:
        """The same for a metric [n, L]; plain numbers where the evaluation does not say."""
        count = curve.values.shape[1]
        known = self.evaluation.get("load_layers", [])
        return known if len(known) == count else list(range(count))


def read_run(workdir: Path) -> RunFiles:
    """Raises ReportError where the folder or its metrics are missing or a file cannot be read."""
    starts = read_json(workdir / "run.json").get("starts", [])
    pairs = workdir / "pairs.npz"
    pairs_LEE = None
    if pairs.is_file():
        with np.load(pairs) as arrays:
            pairs_LEE = arrays["pairs"].astype(np.float64)
    return RunFiles(
        records=_read_records(workdir),
        evaluation=read_json(workdir / "evaluation.json"),
        config=read_json(workdir / "config.json"),
        start=starts[-1] if starts else {},
        pairs_LEE=pairs_LEE,
        events=_read_events(workdir),
    )


def curve(records: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """The metric `key` over the records that have it; None where none does."""
    found = [(record["step"], record[key]) for record in records if key in record]
    if not found:
        return None
    steps, values = zip(*found, strict=True)
    return Curve(steps=np.array(steps, np.float64), values=np.array(values, np.float64))


def layer_curve(records: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """The same as [n, L], for a metric with a value a layer; a lone number is one layer."""
    found = curve(records, key)
    if found is None or not found.values.size:
        return None
    return Curve(steps=found.steps, values=found.values.reshape(len(found.steps), -1))


def _read_records(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / JSONL_NAME
    if not workdir.is_dir():
        raise ReportError(f"{workdir} is not a folder")
    if not path.is_file():
        raise ReportError(f"{workdir} has no {JSONL_NAME}: it is not the folder of a run")
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise ReportError(str(error)) from error
    if not records:
        raise ReportError(f"{path} has no records yet")
    return records


def _read_events(workdir: Path) -> list[dict[str, Any]]:
    try:
        return read_events(workdir)
    except ValueError as error:
        raise ReportError(str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
