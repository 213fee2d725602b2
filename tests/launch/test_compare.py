"""`launch.compare`: every variant trains once, the table says what the runs' own files say, failures stop nobody."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.compare import main
from moe import config
from moe.analysis.comparison import Row, read_row, table

FILE = """import dataclasses
from configs import debug

def _short(**changes):
    c = debug.get_config()
    checkpoint = dataclasses.replace(c.checkpoint, every=100, keep_best=0)
    return dataclasses.replace(c, steps=2, checkpoint=checkpoint, optim=dataclasses.replace(
        c.optim, schedule=dataclasses.replace(c.optim.schedule, warmup_steps=1)), **changes)

def plain():
    \"\"\"As it is.

    Not in the table.\"\"\"
    return _short()

def wrong():
    return _short(batch_size=7)
"""


def test_every_variant_is_trained_once_and_a_failing_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pair.py").write_text(FILE)
    words = ["--configs", str(tmp_path / "pair.py"), "--workdir", str(tmp_path / "runs"), "--seeds", "0"]
    words += ["--page", str(tmp_path / "docs" / "page.md")]
    assert main(words) == 1
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "`plain`" in page and "As it is. |" in page and "Did not finish: wrong-seed0" in page
    assert page.strip() == capsys.readouterr().out.strip()
    log = (tmp_path / "runs" / "plain-seed0.log").read_text()
    assert main([*words, "--only", "plain"]) == 0
    assert (tmp_path / "runs" / "plain-seed0.log").read_text() == log, "a finished run started again"
    assert main([*words, "--only", "wrong"]) == 1
    assert "batch_size = 7" in (tmp_path / "runs" / "wrong-seed0.log").read_text()


def test_a_finished_run_of_another_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pair.py").write_text(FILE)
    scope: dict[str, Any] = {}
    exec(FILE, scope)
    workdir = tmp_path / "runs" / "plain-seed0"
    workdir.mkdir(parents=True)
    config.save(scope["plain"](), workdir / "config.json")
    (workdir / "summary.json").write_text(json.dumps({"mean_bits_per_byte": 2.5}))
    words = ["--configs", str(tmp_path / "pair.py"), "--workdir", str(tmp_path / "runs"), "--only", "plain"]
    with pytest.raises(SystemExit):
        main([*words, "--steps", "1"])
    assert "holds a run with another config" in (said := capsys.readouterr().err) and "steps: 2 -> 1" in said


def test_an_unknown_variant_is_named_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pair.py").write_text(FILE)
    with pytest.raises(SystemExit) as stop:
        main(["--configs", str(tmp_path / "pair.py"), "--only", "plan"])
    assert stop.value.code == 2
    assert "only = 'plan'" in (said := capsys.readouterr().err) and "has plain, wrong" in said


def test_a_row_is_read_from_the_files_of_a_run(tmp_path: Path) -> None:
    summary = {"mean_bits_per_byte": 2.5, "parameters/active": 10, "parameters/total": 30}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    records = [
        {
            "time/step_s": (200 - step) / 1000,
            "load/max_violation": [5.0, 5.0] if step < 150 else [0.0, 1.0],
            "load/dead": [1, 2],
            "load/dropped": [0.0, 0.5 * (step % 2)],
        }
        for step in range(200)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    row = read_row(tmp_path)
    assert row == Row(2.5, 0.5, 3.0, 0.125, 0.021, 10, 30)


def test_the_table_has_the_best_variant_first_and_the_spread_over_seeds() -> None:
    row = Row(2.0, 0.5, 3.0, 0.125, 0.110, 10, 3000)
    lines = table(
        {"worse": [row._replace(bits_per_byte=3.0)], "better": [row, row._replace(bits_per_byte=2.2, step_s=0.1)]},
        {"better": "a note"},
    )
    assert lines[2] == "| `better` | 2.100 ± 0.100 | 0.50 | 3.0 | 12.50% | 100 | 10 | 3,000 | 2 | a note |"
    assert lines[3].startswith("| `worse` | 3.000 | 0.50 |")


def test_a_model_without_experts_has_a_dash() -> None:
    row = Row(2.0, float("nan"), float("nan"), float("nan"), 0.1, 10, 10)
    assert table({"dense": [row]}, {})[2].startswith("| `dense` | 2.000 | - | - | - | 100 |")
