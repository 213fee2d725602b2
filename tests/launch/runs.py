"""Tiny real runs for tests: generated text, the debug config, a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

from moe.train.metrics import read_metrics


def write_text(root: Path) -> Path:
    """Two domains of generated text, small enough that a run takes seconds."""
    draw = random.Random(0)
    for domain, words in {"numbers": "one two three four five", "colours": "red green blue black white"}.items():
        (root / domain).mkdir(parents=True)
        for index in range(6):
            (root / domain / f"{index}.txt").write_text(" ".join(draw.choices(words.split(), k=2000)))
    return root


def command(text: Path, workdir: Path, *flags: str, config: str = "configs/debug.py:folder") -> list[str]:
    """The debug run on a folder of text, its cache beside the text."""
    return [
        sys.executable, "-m", "launch.train", config, "--workdir", str(workdir),
        "--data.source.path", str(text), "--data.cache-dir", f"{text}-cache", "--data.validation-fraction", "0.2",
        *flags,
    ]  # fmt: skip


def environment(text: Path, devices: int = 1) -> dict[str, str]:
    # A compilation cache, so that a restart costs a second instead of ten, and no LLVM optimisation: tests pay for
    # compilation, not for execution.
    return os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": f"{text}-jit",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(
    text: Path, workdir: Path, *flags: str, devices: int = 1, status: int = 0, config: str = "configs/debug.py:folder"
) -> str:
    """Runs it to its end and returns what it said."""
    done = subprocess.run(
        command(text, workdir, *flags, config=config),
        env=environment(text, devices), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr


def reproducible(workdir: Path) -> list[dict[str, object]]:
    """The records of metrics.jsonl without times and rates."""
    return [
        {key: value for key, value in record.items() if not key.startswith("time/")}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]
