"""A run that is moved from device count to device count, and to several processes, goes on with the same curve."""

import math
import signal
import subprocess
import time
from pathlib import Path

from launch import exits
from moe.train.metrics import read_metrics
from tests.launch import several
from tests.launch.runs import command, reproducible, run
from tests.multiprocess.together import free_port

STEPS = 48
FLAGS = (
    "--steps",
    str(STEPS),
    "--batch-size",
    "16",
    "--evaluate.every",
    "0",
    "--checkpoint.keep-best",
    "0",
    "--cluster.verify-after",
    "2",
)
LEGS = ((1, 8), (1, 4), (2, 4), (1, 1))
"""(processes, devices of each)"""


def test_eight_devices_four_two_processes_one_device(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "whole", *FLAGS, devices=8)
    expected = reproducible(tmp_path / "whole")

    moved, stops = tmp_path / "moved", []
    for processes, devices in LEGS[:-1]:
        port = free_port()
        started = [
            several.start(
                command(text, moved, *FLAGS)[2:],
                several.place(index, processes, port) if processes > 1 else {},
                text,
                devices,
            )
            for index in range(processes)
        ]
        wait_for(started, moved, steps=max(stops, default=0) + 2)
        started[-1].send_signal(signal.SIGTERM)  # one of them is asked, all stop
        for end in several.finish(started):
            assert end.status == exits.AGAIN, end.said
        stops.append(len(read_metrics(moved / "metrics.jsonl")))
    assert f"resumed at step {stops[-1]}" in run(text, moved, *FLAGS)

    found = reproducible(moved)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert sorted(set(stops)) == stops and stops[-1] < STEPS, "a leg trained no step, or the last one had nothing to do"
    for mine, whole in zip(found, expected, strict=True):
        assert mine["load/tokens"] == whole["load/tokens"], "other data were read"
        for name in ("loss", "loss/lm", "grad_norm"):
            assert math.isclose(mine[name], whole[name], rel_tol=1e-4), (mine["step"], name)  # type: ignore[arg-type]


def wait_for(started: list[subprocess.Popen[str]], workdir: Path, steps: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        if (workdir / "metrics.jsonl").is_file() and len(read_metrics(workdir / "metrics.jsonl")) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError([end.said[-2000:] for end in several.finish(started, 20)])
