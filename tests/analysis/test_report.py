"""A synthetic run folder in, pictures and numbers out; the numbers are those that went in."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from launch.report import main
from moe.analysis import report, report_history, report_routing
from moe.analysis.plots import moving_average
from moe.analysis.plots_routing import expert_order
from moe.analysis.report import write_report
from moe.analysis.run_files import ReportError, curve
from moe.train import events
from moe.train.metrics import MetricWriter
from tests.analysis.made_run import PICTURES, make_large, make_run


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the IHDR chunk that every PNG starts with."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = make_run(tmp_path_factory.mktemp("run"))
    write_report(workdir)
    return workdir


def test_pictures_have_the_right_size_and_the_report_shows_them_all(run: Path) -> None:
    text = (run / "report" / "report.md").read_text()
    sizes = {path.name: png_size(path) for path in (run / "report").glob("*.png")}
    assert sizes["overview.png"] == (1600, 900)
    assert (run / "report" / "overview.png").stat().st_size < 250_000
    assert set(sizes) == {f"{name}.png" for name in PICTURES}
    for name, (width, height) in sizes.items():
        assert f"]({name})" in text
        assert width >= 1000 and height >= 500
        assert (run / "report" / name).stat().st_size > 10_000


def test_numbers_in_the_report_are_those_of_the_run(run: Path) -> None:
    text = (run / "report" / "report.md").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    for name, domain in evaluation["domains"].items():
        numbers = [domain[key] for key in ("bits_per_byte", "unigram", "gzip", "xz")]
        cells = [name, f"{domain['bytes']:,}", *(f"{number:.4f}" for number in numbers)]
        assert "| " + " | ".join(cells) + " |" in text
    assert "| **mean** |  | 1.4100 |" in text  # (1.21 + 1.83 + 0.92 + 0.74 + 2.35) / 5
    assert "| parameters | 12,345,678 |" in text
    assert "| active parameters a token | 3,456,789 |" in text
    assert "| training tokens, padding included | 4,915,200 |" in text  # 600 * 8192


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing takes seconds."""
    for module in (report, report_history, report_routing):
        monkeypatch.setattr(module, "save_figure", lambda path, size, draw: path.touch())


@pytest.mark.usefixtures("undrawn")
def test_summary_is_flat_numbers_and_keeps_what_it_had(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, steps=100)
    (workdir / "summary.json").write_text(json.dumps({"parameters/total": 1, "compile_s": 8.5}))
    write_report(workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    assert all(isinstance(value, (int, float)) for value in summary.values())
    assert summary["compile_s"] == 8.5
    assert summary["parameters/total"] == 12_345_678
    assert summary["steps"] == summary["evaluation_step"] == 100
    assert summary["bits_per_byte/code"] == 1.21 and summary["load/agreement/layer_2"] == 0.8
    load = np.array([d["load"] for d in json.loads((workdir / "evaluation.json").read_text())["domains"].values()])
    pairs = [np.abs(load[a, 2] - load[b, 2]).sum() / 2 for a in range(5) for b in range(a)]
    assert summary["load/domain_distance/layer_3"] == pytest.approx(np.mean(pairs))


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == first


@pytest.mark.usefixtures("undrawn")
def test_a_dense_model_gets_a_report_without_routing(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, steps=100, moe=False)
    text = write_report(workdir).read_text()
    assert "its model has no MoE layer" in text
    assert {path.name for path in workdir.glob("report/*.png")} == {"overview.png", "baselines.png", "training.png"}
    assert "nan" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_evaluation_or_config_says_so_and_drops_stale_pictures(tmp_path: Path) -> None:
    workdir = make_run(tmp_path, steps=50)
    write_report(workdir)
    for name in ("evaluation.json", "config.json"):
        (workdir / name).unlink()
    text = write_report(workdir).read_text()
    for sentence in ("no final evaluation", "not evaluated while it trained", "saved no `config.json`"):
        assert sentence in text
    left = {"training.png", "load.png", "histogram.png", "router.png"}
    assert {path.name for path in workdir.glob("report/*.png")} == left


def test_one_record_one_domain_and_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {"loss": float("nan"), "load/max_violation": [0.5], "load/dropped": [0.0]})
    domain = {"bytes": 10, "tokens": 5, "bits_per_byte": 2.0, "load": [[0.5, 0.25, 0.25, 0.0]]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"domains": {"only": domain}, "load_layers": [4]}))
    text = write_report(tmp_path).read_text()
    assert "| only | 10 | 2 | – | – | – |" in text
    # max violation 4 * 0.5 - 1 = 1; entropy (0.5 + 0.5 + 0.5) / 2 = 0.75 in bits of log2 4; expert 3 is dead.
    assert "| 4 | 1 | 0.7500 | 1 | – |" in text
    assert "| 4 | 0 (2.0), 1 (1.0), 2 (1.0) |" in text


def test_many_layers_and_experts_fit(tmp_path: Path) -> None:
    make_large(tmp_path, layers=9, experts=40)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 1.5}\n')  # a step that logged no load leaves its curves as they were
    text = write_report(tmp_path).read_text()
    sizes = {path.stem: png_size(path) for path in tmp_path.glob("report/*.png")}
    assert set(sizes) == PICTURES and sizes["routing"][0] == 2400
    assert max(height for _, height in sizes.values()) <= 1500
    # The last layer has half the experts, with even load: 0 from max violation, none dead, though the arrays are wider.
    assert "| 8 | 0 | 1 | 0 | 0 |" in text


@pytest.mark.parametrize(
    "make", [lambda d: None, lambda d: d.mkdir(), lambda d: (d.mkdir(), (d / "metrics.jsonl").touch())]
)
def test_the_command_answers_a_folder_without_a_run_with_one_line(make, tmp_path: Path, capsys) -> None:
    make(tmp_path / "nothing")
    assert main([str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "nothing" in said.err


def test_the_command_says_where_the_report_is(tmp_path: Path, capsys) -> None:
    make_run(tmp_path, steps=5, moe=False, evaluated=False)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report' / 'report.md'}\n"


def test_damaged_json_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5, moe=False, evaluated=False)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ReportError, match=r"evaluation\.json is not JSON"):
        write_report(tmp_path)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report(make_run(tmp_path, steps=5, moe=False, evaluated=False))
    assert dict(matplotlib.rcParams) == before
    code = "import sys, moe.analysis.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("changes", "sentence", "pictures"),
    [
        ({"skipped": "the layers differ"}, "Not studied: the layers differ.", set()),
        ({"agreement": None}, "no checkpoint before this one is saved", {"pairs.png"}),
    ],
)
def test_a_study_that_was_not_possible_says_why(
    changes: dict[str, object], sentence: str, pictures: set[str], tmp_path: Path
) -> None:
    make_run(tmp_path, steps=5)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    evaluation["choices"] |= changes
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert sentence in write_report(tmp_path).read_text()
    assert {path.name for path in tmp_path.glob("report/[pa][ag]*.png")} == pictures


@pytest.mark.usefixtures("undrawn")
def test_the_report_names_any_router_and_says_what_each_balance_rule_did(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, steps=5)).read_text()
    assert "| router | `somewhere.mine:OwnRouterConfig`, num_selected 2, init_std 0.5 |" in text
    assert "| balance rule even | by exact, one pass more |" in text
    # Agreement and top-k sum are those of the evaluation: floor K / E = 2 / 16.
    assert "| 1 | 0.9000 | 0.8500 | 0.2000 |" in text
    assert "| 2 | 0.1250 | 0.2000 | 0.2000 | 0.2000 | 0.2000 | 0.2000 |" in text


def test_events_are_shown_once_there_is_more_than_start_and_finish(tmp_path: Path) -> None:
    def write(*names: str) -> str:
        lines = [{"time": f"t{n}", "event": name, "step": n} for n, name in enumerate(names)]
        (workdir / events.NAME).write_text("".join(json.dumps(line | {"to": 1}) + "\n" for line in lines))
        return write_report(workdir).read_text()

    workdir = make_run(tmp_path, steps=3)
    assert "## Events" not in write_report(workdir).read_text() + write(events.STARTED, events.FINISHED)
    text = write(events.STARTED, events.ROLLBACK, events.FINISHED)
    assert "## Events" in text and "| t1 | 1 | rollback | to 1 |" in text
    text = write(*[events.RESUMED] * 35)
    assert "The last 30; 5 came before them." in text and "| t5 |" in text and "| t4 |" not in text
    (workdir / events.NAME).write_text("x\n")
    with pytest.raises(ReportError, match=r"events.jsonl:1: not an event"):
        write_report(workdir)


def test_expert_order_makes_a_staircase() -> None:
    # Row 0 owns experts 1 (3.0) and 2 (2.0), row 1 owns 0 (2.5) and 3 (1.5).
    assert expert_order(np.array([[0.5, 3.0, 2.0, 0.1], [2.5, 0.0, 1.0, 1.5]])) == [1, 2, 0, 3]


def test_moving_average_uses_finite_values_alone() -> None:
    np.testing.assert_array_equal(moving_average(np.array([1.0, 2.0])), [1.0, 2.0])  # a window of 1
    values = np.ones(120)  # a window of 3
    values[10], values[50] = np.nan, 4.0
    smooth = moving_average(values)
    assert smooth[10] == 1.0
    np.testing.assert_allclose(smooth[49:52], 2.0)  # (1 + 1 + 4) / 3
    assert smooth[0] == smooth[-1] == 1.0


def test_a_curve_has_the_records_that_hold_its_key() -> None:
    found = curve([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0}], "a")
    assert found is not None and found.steps.tolist() == [1, 3] and found.values.tolist() == [2, 4]
    assert curve([{"step": 1}], "a") is None


@pytest.mark.usefixtures("undrawn")
def test_a_domain_that_some_layer_routes_nowhere_is_left_out_and_named(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    load = evaluation["domains"]["code"]["load"]
    load[1] = [0.0] * len(load[1])
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = write_report(tmp_path).read_text()
    assert "gave none of their tokens to an expert: code." in text
    assert "| layer | english | tables | headers | names |" in text
