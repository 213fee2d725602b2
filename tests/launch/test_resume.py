"""A run killed at any moment goes on with the same curve: `kill -9`, then the same command."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.train.metrics import read_metrics

STEPS = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of generated text, small enough that a run takes seconds."""
    root = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for domain, words in {"numbers": "one two three four five", "colours": "red green blue black white"}.items():
        (root / domain).mkdir()
        for index in range(6):
            (root / domain / f"{index}.txt").write_text(" ".join(draw.choices(words.split(), k=2000)))
    return root


def command(text: Path, workdir: Path, cache: Path) -> list[str]:
    return [
        sys.executable, "-m", "launch.train", "configs/debug.py:folder", "--workdir", str(workdir),
        "--data.source.path", str(text), "--data.cache-dir", str(cache), "--data.validation-fraction", "0.2",
        "--steps", str(STEPS), "--checkpoint.every", "3", "--checkpoint.keep-best", "0",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    # A compilation cache, so that every restart costs a second instead of ten; it holds no numbers of the run.
    flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | flags


def reproducible(workdir: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in record.items() if not key.startswith("time/")}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


def test_five_kills_leave_no_trace_in_the_metrics(text: Path, tmp_path: Path) -> None:
    env = environment() | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jit")}
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    subprocess.run(command(text, whole, cache), env=env, check=True, capture_output=True, timeout=300)
    expected = reproducible(whole)
    assert [record["step"] for record in expected] == list(range(1, STEPS + 1))

    draw = random.Random(1)
    kills = 0
    while kills < 5:
        process = subprocess.Popen(
            command(text, killed, cache), env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        wait_for_progress(process, killed, during_save=kills % 2 == 1)
        time.sleep(draw.uniform(0.0, 0.15))
        if process.poll() is not None:
            pytest.fail(f"the run ended before it could be killed: {process.communicate()[1].decode()[-500:]}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    done = subprocess.run(
        command(text, killed, cache), env=env, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert reproducible(killed) == expected


def wait_for_progress(process: subprocess.Popen[bytes], workdir: Path, during_save: bool) -> None:
    """Returns once the run has written records beyond those it found, or (during_save) while a save is under way."""
    metrics = workdir / "metrics.jsonl"
    seen = metrics.stat().st_size if metrics.is_file() else 0
    deadline = time.monotonic() + 120
    started = False
    while time.monotonic() < deadline and process.poll() is None:
        size = metrics.stat().st_size if metrics.is_file() else 0
        started = started or size < seen or size > seen
        if started and (not during_save or list((workdir / "checkpoints").glob("*tmp*"))):
            return
        time.sleep(0.002)


def test_sigterm_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path) -> None:
    env = environment() | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jit")}
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    process = subprocess.Popen(command(text, workdir, cache), env=env, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (workdir / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    saved = [int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit()]
    assert max(saved) == len(read_metrics(workdir / "metrics.jsonl")) < STEPS
    done = subprocess.run(command(text, workdir, cache), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in reproducible(workdir)] == list(range(1, STEPS + 1))
