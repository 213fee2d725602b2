"""What a sweep's folder says of its runs, also while they write and after they were cut off."""

import json
from pathlib import Path

import pytest

from configs import debug
from moe.sweep import Listed, Sweep
from moe.sweep.folder import (
    config_path,
    is_finished,
    last_record,
    last_words,
    read_end,
    read_manifest,
    write_end,
    write_manifest,
)  # fmt: skip
from moe.train.load import load_config


def test_the_manifest_gives_back_the_sweep_and_each_config_can_be_started_from(tmp_path: Path) -> None:
    sweep = Sweep(
        variants=Listed(of={"a": {}, "b": {"steps": 30}}), base=debug.get_config(), seeds=(0, 5), baseline="a"
    )
    runs = sweep.runs()
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, sweep.baseline, runs)
    found = read_manifest(tmp_path)
    assert found is not None and found.baseline == "a"
    assert [(entry.folder, entry.steps) for entry in found.runs] == [(run.folder, run.config.steps) for run in runs]
    saved = config_path(tmp_path, "b/seed-5")
    (tmp_path / "config.json").write_text(saved.read_text())
    assert load_config(tmp_path) == runs[3].config


@pytest.mark.parametrize(
    ("summary", "finished"),
    [
        ({"mean_bits_per_byte": 2.0, "steps": 20, "evaluation_step": 20}, True),
        ({"mean_bits_per_byte": 2.0, "steps": 20, "evaluation_step": 10}, False),
        ({"mean_bits_per_byte": 2.0, "steps": 10, "evaluation_step": 10}, False),
        ({"steps": 20}, False),
        (None, False),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_evaluated(
    summary: dict[str, float] | None, finished: bool, tmp_path: Path
) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert is_finished(tmp_path, 20) == finished


def test_half_a_summary_is_none(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"mean_bits_per_byte": 2.0, "ste')
    assert not is_finished(tmp_path, 20)


def test_the_last_record_is_the_last_whole_one(tmp_path: Path) -> None:
    assert last_record(tmp_path) is None
    lines = "".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in range(1, 40_000))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 40000, "lo')
    assert last_record(tmp_path) == {"step": 39_999, "loss": 2.0}


def test_the_last_words_are_the_error_of_the_last_start(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("error: an old one\n")
    start = log.stat().st_size
    log.write_text("error: an old one\n1/20 loss 3\nerror: steps = 0: must be more\nand a remark\n")
    assert last_words(log, start) == "steps = 0: must be more"
    log.write_text("error: an old one\nTraceback:\n  File\nValueError: no\n\n")
    assert last_words(log, start) == "ValueError: no"
    assert last_words(tmp_path / "none.log") == ""


def test_how_a_run_ended_is_kept(tmp_path: Path) -> None:
    assert read_end(tmp_path, "a/seed-0") is None
    write_end(tmp_path, "a/seed-0", 2, "steps = 0")
    assert read_end(tmp_path, "a/seed-0") == (2, "steps = 0")
