"""A run killed at any moment goes on with the same curve: `kill -9`, then the same command."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import exits
from moe.train.metrics import read_metrics
from tests.launch.runs import command, environment, reproducible, run

STEPS = 90
FLAGS = ("--steps", str(STEPS), "--checkpoint.every", "3", "--checkpoint.keep-best", "0")


def test_five_kills_two_of_them_during_a_save_leave_no_trace_in_the_metrics(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole", *FLAGS)
    expected = reproducible(tmp_path / "whole")
    assert [record["step"] for record in expected] == list(range(1, STEPS + 1))

    killed, draw = tmp_path / "killed", random.Random(1)
    left_unfinished = resumed_from = 0
    for kill in range(5):
        process = subprocess.Popen(command(text, killed, *FLAGS), env=environment(text), stderr=subprocess.PIPE)
        wait_for_progress(process, killed, during_save=kill % 2 == 1)
        if kill % 2 == 0:
            time.sleep(draw.uniform(0.0, 0.15))
        if process.poll() is not None:
            pytest.fail(f"the run ended before it could be killed: {process.communicate()[1].decode()[-500:]}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left_unfinished += bool(unfinished_saves(killed))
        assert newest(killed) > resumed_from, "this kill left nothing new to resume from: the test has lost its teeth"
        resumed_from = newest(killed)
    assert left_unfinished >= 1, "no kill hit a save: the test has lost its teeth"
    assert f"resumed at step {resumed_from}" in run(text, killed, *FLAGS)
    assert reproducible(killed) == expected
    assert not unfinished_saves(killed)


def wait_for_progress(process: subprocess.Popen[bytes], workdir: Path, during_save: bool) -> None:
    """Returns once the run has completed a checkpoint beyond those it found, and (during_save) while it writes another.

    Without a complete checkpoint the next start would begin at step 0, and a broken resume would go unnoticed.
    """
    found = newest(workdir)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if newest(workdir) > found and (not during_save or unfinished_saves(workdir)):
            return
        time.sleep(0.002)


def newest(workdir: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def unfinished_saves(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def test_sigterm_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    process = subprocess.Popen(command(text, workdir, *FLAGS), env=environment(text), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (workdir / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == exits.AGAIN, said
    saved = [int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit()]
    assert max(saved) == len(read_metrics(workdir / "metrics.jsonl")) < STEPS
    run(text, workdir, *FLAGS)
    assert [record["step"] for record in reproducible(workdir)] == list(range(1, STEPS + 1))
