"""Checkpoints of two real processes: what one of them finds both act on, and one alone can read."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from moe.train.checkpoint import Checkpoints
from moe.train.checksums import checksums
from moe.train.run import CheckpointConfig
from tests.multiprocess.together import run_together
from tests.train.small_state import make, mesh_of, placed, shardings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    run_together("tests.train.checkpoint_worker", 2, 4, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found.{index}").read_text()) for index in range(2)]


def test_checksums_of_two_processes_are_those_of_one(found: list[dict[str, Any]], folder: Path) -> None:
    one = shardings(mesh_of(jax.devices()[:1]))
    expected = checksums(placed(6, one))
    assert [answer["checksums"] for answer in found] == [expected, expected]
    restored = Checkpoints(folder / "run", CheckpointConfig()).restore_newest(make, one)
    assert restored is not None and checksums(restored.state) == expected


def test_one_process_of_two_restores_alone(found: list[dict[str, Any]]) -> None:
    wanted = {name: value for name, value in found[0]["checksums"].items() if name.startswith("params")}
    assert found[0]["alone"] == wanted and len(wanted) == 2


def test_what_one_process_cannot_read_both_skip(found: list[dict[str, Any]], folder: Path) -> None:
    for answer in found:
        assert answer["restored"] == [3, {"next_step": 3}, True]
        assert answer["again"] == [6, True]
    assert [path.name for path in (folder / "run" / "damaged").iterdir()] == ["6-1"]
    for index in range(2):
        said = (folder / f"{index}.log").read_text()
        assert "process 1: checkpoint 6: PermissionError: this host may not" in said


def test_a_replica_of_another_process_that_differs_is_named_on_both(found: list[dict[str, Any]]) -> None:
    for answer in found:
        assert answer["replicas"].startswith("Diverged: replicas of the state differ: skipped: device ")
        assert answer["replicas"].endswith("(process 1) differs from 3 others")


def test_a_mistake_of_one_process_and_a_disk_that_is_not_shared_are_told_by_both(found: list[dict[str, Any]]) -> None:
    for answer in found:
        assert answer["mistake"] == "ConfigError: process 1: a mistake"
        assert (
            "the checkpoints are not the same for all processes (process 0 sees [0]; process 1"
            in (answer["not shared"])
        )
