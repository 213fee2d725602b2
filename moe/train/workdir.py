"""A run's folder: who may write in it, and what it says about the run beside the metrics."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from moe import config as configs
from moe.config import ConfigError
from moe.train.load import CONFIG_NAME, load_config
from moe.train.lock import Lock
from moe.train.run import RunConfig

RECORD_NAME = "run.json"
LOCK_NAME = "lock"
MAY_CHANGE = (
    "mesh.",
    "cluster.",
    "watchdog.",
    "rollback.",
    "checkpoint.",
    "profile",
    "data.cache_dir",
    "data.num_threads",
    "data.prefetch",
    "data.read_",
    "data.verify",
)
"""What a resumed run may change: where and how it runs, never what it computes (`rollback`: until that is used)."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "array-record")


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """ConfigError if the folder belongs to another run (with the difference) or is no folder; writes nothing."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"workdir = '{workdir}': is a file")
    if not (workdir / CONFIG_NAME).is_file():
        # A process killed while it opened the folder left no more than these, and no run.
        begun = {LOCK_NAME, RECORD_NAME, f"{RECORD_NAME}.partial", f"{CONFIG_NAME}.partial"}
        if workdir.is_dir() and any(path.name not in begun for path in workdir.iterdir()):
            raise ConfigError(f"workdir = '{workdir}': is not empty and is not the folder of a run; name another")
        return
    changes = [line for line in configs.diff(load_config(workdir), config) if not line.startswith(MAY_CHANGE)]
    if changes:
        raise ConfigError(
            f"workdir = '{workdir}': holds a run with another config; name another ({'; '.join(changes)})"
        )


def check_shared(workdir: Path, config: RunConfig) -> None:
    """ConfigError unless this process sees what process 0 has just written with `open_workdir`."""
    if not (workdir / CONFIG_NAME).is_file() or configs.diff(load_config(workdir), config):
        raise ConfigError(
            f"workdir = '{workdir}': this host does not see the {CONFIG_NAME} that process 0 wrote there; a run over"
            " several hosts needs a folder that all of them share"
        )


def open_workdir(workdir: Path, config: RunConfig, record: dict[str, Any]) -> Lock:
    """Makes the folder and writes config and record, each whole or not at all.

    Only one process may train in a folder: it keeps what this returns until it writes no more. ConfigError if another
    process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = Lock(workdir / LOCK_NAME, f"workdir = '{workdir}'", "trains here")
    partial = workdir / f"{CONFIG_NAME}.partial"
    configs.save(config, partial)
    history = workdir / RECORD_NAME
    starts = json.loads(history.read_text())["starts"] if history.is_file() else []
    start = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")} | environment() | record
    history_partial = workdir / f"{RECORD_NAME}.partial"
    history_partial.write_text(json.dumps({"starts": [*starts, start]}, indent=1) + "\n")
    history_partial.replace(history)
    partial.replace(workdir / CONFIG_NAME)
    return lock


def environment() -> dict[str, Any]:
    """Versions, commit and devices."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.local_devices()],
        "processes": jax.process_count(),
    }
