"""A real SLURM runs the quickstart, cuts it off and requeues it: the curve is the one of the same run started by hand.

For the time of a test it is the quickstart of 12 steps with small evaluations at the sixth and the last; model, batch
and data are its own. No checkpoint is due before the last step, so the one it goes on from is the one the signal asked
for. `python -m tests.slurm.quickstart` runs all 400 steps.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import reproducible
from tests.slurm.cluster import Unavailable, available, cluster
from tests.slurm.quickstart import SCANCEL, furthest, run_local, run_slurm

WORDS = (
    "--steps", "12", "--optim.schedule.warmup-steps", "3", "--checkpoint.every", "12", "--evaluate.every", "6",
    "--evaluate.max-bytes", "1024", "--evaluate.final-max-bytes", "1024",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the three runs share: prepared data, compiled programs."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def by_slurm(folder: Path) -> Path:
    """The run that was cut off after some step past the third, requeued, and went on to its end."""
    try:
        available()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with cluster(folder / "cluster") as slurm:
        return run_slurm(folder, WORDS, ((3, SCANCEL),), slurm, 900)


def test_it_was_cut_off_before_its_end_and_went_on(folder: Path, by_slurm: Path) -> None:
    log = "".join(path.read_text() for path in (folder / "slurm.slurm").glob("*.log"))
    assert "ended with status 75" in log and "which does not count" in log
    saved, resumed = (re.findall(rf"{what} step (\d+)", log) for what in ("saved", "resumed at"))
    assert saved == resumed and len(resumed) == 1 and 3 <= int(resumed[0]) < 12
    assert [record["step"] for record in reproducible(by_slurm)] == list(range(1, 13))


def evaluation(workdir: Path) -> dict[str, Any]:
    """The last evaluation without its time and without what it says of an earlier checkpoint, which only the run that
    was cut off has."""
    found: dict[str, Any] = json.loads((workdir / "evaluation.json").read_text())
    del found["seconds"], found["choices"]["against"], found["choices"]["agreement"]
    return found


def test_two_processes_started_by_hand_give_the_same_bits(folder: Path, by_slurm: Path) -> None:
    by_hand = run_local(folder, 2, 4, WORDS)
    assert reproducible(by_slurm) == reproducible(by_hand)
    assert evaluation(by_slurm) == evaluation(by_hand)
    assert (by_slurm / "config.json").read_bytes() == (by_hand / "config.json").read_bytes()


def test_one_process_gives_the_same_curve(folder: Path, by_slurm: Path) -> None:
    apart, where = furthest(by_slurm, run_local(folder, 1, 8, WORDS))
    assert apart < 1e-5, where
