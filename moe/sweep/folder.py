"""A sweep's folder: `NAME/seed-N` are runs, `sweep/` is what the sweep itself writes, `report/` the report over them.

In `sweep/`: `manifest.json` says which runs there are; `NAME/seed-N.json` is a run's config as it is started from,
`.log` what it said, `.end.json` how it last ended; `lock` is held by the process that drives the sweep.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe import config as configs
from moe.sweep.sweep import SweepRun
from moe.train.metrics import JSONL_NAME

MANIFEST = "sweep/manifest.json"
LOCK = "sweep/lock"
TAIL_BYTES = 1 << 20
"""Of the end of metrics.jsonl: more than a record of any model takes."""


class Entry(NamedTuple):
    """A run in the manifest."""

    name: str
    seed: int
    steps: int
    note: str

    @property
    def folder(self) -> str:
        return f"{self.name}/seed-{self.seed}"


class Manifest(NamedTuple):
    """What a sweep was when it was last started."""

    baseline: str | None
    runs: tuple[Entry, ...]


def write_manifest(root: Path, baseline: str | None, runs: Sequence[SweepRun]) -> None:
    """Writes the manifest and the config of every run, each whole or not at all."""
    entries = [Entry(run.name, run.seed, run.config.steps, run.note)._asdict() for run in runs]
    for run in runs:
        path = config_path(root, run.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, configs.to_dict(run.config))
    write_json(root / MANIFEST, {"baseline": baseline, "runs": entries})


def read_manifest(root: Path) -> Manifest | None:
    """None for a folder that is no sweep's."""
    if not (root / MANIFEST).is_file():
        return None
    data = json.loads((root / MANIFEST).read_text())
    return Manifest(data["baseline"], tuple(Entry(**entry) for entry in data["runs"]))


def config_path(root: Path, folder: str) -> Path:
    return root / "sweep" / f"{folder}.json"


def log_path(root: Path, folder: str) -> Path:
    return root / "sweep" / f"{folder}.log"


def end_path(root: Path, folder: str) -> Path:
    return root / "sweep" / f"{folder}.end.json"


def write_end(root: Path, folder: str, status: int, message: str) -> None:
    """Notes how a run's process ended."""
    write_json(end_path(root, folder), {"status": status, "message": message})


def read_end(root: Path, folder: str) -> tuple[int, str] | None:
    """(exit status, last line) of how the run last ended under this sweep."""
    path = end_path(root, folder)
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    return data["status"], data["message"]


def is_finished(workdir: Path, steps: int) -> bool:
    """Whether the run was trained and evaluated at step `steps`; its summary is the last thing it writes."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):  # none yet, or cut off in the middle: not finished
        return False
    return "mean_bits_per_byte" in summary and summary.get("evaluation_step") == summary.get("steps") == steps


def last_record(workdir: Path) -> dict[str, Any] | None:
    """The newest whole record of a run that may be writing just now."""
    try:
        with (workdir / JSONL_NAME).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is being written
    except OSError:
        return None
    return json.loads(lines[-1]) if lines else None


def last_words(log: Path, start: int = 0) -> str:
    """The last `error: ...` line of a log from byte `start` on, else its last line."""
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:")] or lines
    return said[-1].removeprefix("error: ") if said else ""


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
