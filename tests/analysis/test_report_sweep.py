"""The report over several runs: what is in it, what is left out and named, and the numbers of its tables, by hand."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs import debug
from launch.report import main
from moe import config as configs
from moe.analysis.plots_sweep import chosen
from moe.analysis.sweep_runs import read_runs
from moe.plan.flops import train_flops_per_token
from moe.sweep import Listed, Sweep, SweepRun
from moe.sweep.folder import write_end, write_manifest
from moe.train.metrics import MetricWriter
from moe.train.run import RunConfig

STEPS, TOKENS = 100, 512
FINAL = {"plain": (2.0, 2.1, 2.3), "fast": (1.9, 2.1, 2.1), "wide": (3.0, 3.0, 3.0)}


def make_sweep(seeds: Sequence[int] = (0, 1, 2)) -> Sweep:
    base = dataclasses.replace(debug.get_config(), steps=STEPS)
    changes = {"plain": {}, "fast": {"optim.learning_rate": 1e-2}, "wide": {"model.moe.expert_hidden": 128}}
    return Sweep(variants=Listed(of=changes), base=base, seeds=tuple(seeds), baseline="plain")


def write_run(folder: Path, config: RunConfig, final: float, steps: int = STEPS, finished: bool = True) -> None:
    """A run whose loss falls from 4 to `final` in equal steps of tokens."""
    folder.mkdir(parents=True)
    configs.save(config, folder / "config.json")
    with MetricWriter(folder, resume_step=0) as writer:
        for step in range(1, steps + 1):
            loss = 4 + (final - 4) * step / STEPS
            record = {"loss": loss, "loss/lm": loss, "tokens": TOKENS * step, "time/step_s": (200 - step) / 1000}
            record |= {"load/max_violation": [5.0, 5.0] if step <= 50 else [0.0, 1.0], "load/dead": [1, 2]}
            writer.write(step, record | {"load/dropped": [0.0, 0.5 * (step % 2)]})
    if finished:
        summary = {"mean_bits_per_byte": final, "steps": steps, "evaluation_step": steps}
        summary |= {"parameters/active": 10, "parameters/total": 3000}
        (folder / "summary.json").write_text(json.dumps(summary))


def write_sweep(root: Path, runs: Sequence[SweepRun]) -> None:
    write_manifest(root, "plain", runs)
    for run in runs:
        write_run(root / run.folder, run.config, FINAL[run.name][run.seed])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "three"
    write_sweep(folder, make_sweep().runs())
    assert main([str(folder)]) == 0
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def cells(page: str, title: str, name: str) -> list[str]:
    """A row of the table under a heading, without its first cell."""
    line = next(line for line in page.partition(title)[2].splitlines() if line.startswith(f"| `{name}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_end_of_each_variant_best_first(root: Path) -> None:
    """plain: 2.0, 2.1, 2.3: mean 6.4 / 3, deviations -4/30, -1/30, 5/30, variance 42/900/2, half 4.30265 s / sqrt 3."""
    page = (root / "report" / "report.md").read_text()
    found = cells(page, "## At the end", "plain")
    s = (42 / 900 / 2) ** 0.5
    half = 4.30265 * s / 3**0.5
    assert found[:3] == ["2.1333", f"{s:.4f}", f"{6.4 / 3 - half:.4f} to {6.4 / 3 + half:.4f}"]
    assert found[3:] == ["0.50", "3.0", "12.50%", "110", "10", "3,000", "3", ""]
    assert page.index("| `fast` |") < page.index("| `plain` |") < page.index("| `wide` |")
    assert "## Not in the numbers above" not in page


def test_pairs_by_seed_with_the_baseline(root: Path) -> None:
    """fast - plain: -0.1, 0.0, -0.2: mean -0.1, s 0.1, t = -sqrt 3, p = 1 - sqrt(3 / 5)."""
    page = (root / "report" / "report.md").read_text()
    half = 4.30265 * 0.1 / 3**0.5
    found = cells(page, "## Paired with `plain`", "fast")
    assert found == ["-0.1000", f"{-0.1 - half:+.4f} to {-0.1 + half:+.4f}", "0.225", "0.225", "3"]
    # Differences 1.0, 0.9, 0.7: mean 2.6 / 3, s = sqrt(0.14 / 6), t = 9.827, p = 1 - t / sqrt(t^2 + 2); Holm: twice.
    wide = cells(page, "## Paired with `plain`", "wide")
    assert wide[0] == "+0.8667" and wide[2] == "0.010" and wide[3] == "0.020"
    variants = {row["variant"]: row for row in rows(root / "report" / "variants.csv")}
    assert float(variants["fast"]["mean_bits_per_byte/p"]) == pytest.approx(1 - 0.6**0.5)
    assert variants["plain"]["mean_bits_per_byte/difference"] == ""


def test_the_followed_loss_at_equal_tokens_and_flops(root: Path) -> None:
    """A loss that falls linearly is, over the last 5 % of the steps, what it was 2 steps before the point."""
    page = (root / "report" / "report.md").read_text()
    mean = 6.4 / 3
    at = lambda share: 4 + (mean - 4) * (share - 0.02)  # noqa: E731
    found = cells(page, "### At equal training tokens", "plain")
    assert found[:3] == [f"{at(share):.4f}" for share in (0.25, 0.5, 1.0)]
    assert f"100% of the {TOKENS * STEPS / 1000:.3g}k training tokens of the shortest run" in page

    plain, wide = (
        train_flops_per_token(run.config.model, run.config.data.seq_len)
        for run in make_sweep((0,)).runs()
        if run.name != "fast"
    )
    assert wide > plain
    variants = {row["variant"]: row for row in rows(root / "report" / "variants.csv")}
    key = "loss/lm/at_equal_flops"
    assert float(variants["wide"][f"{key}/at"]) == plain * TOKENS * STEPS
    # The window is 5 % of the FLOPs, so for the dearer model less of its tokens.
    share = plain / wide
    steps = STEPS * share
    window = 0.05 * steps
    low, high = steps - window, steps
    losses = [4 + (3.0 - 4) * (int(t) + 1) / STEPS for t in range(STEPS)]
    mean_loss = sum(max(0.0, min(high, k + 1) - max(low, k)) * loss for k, loss in enumerate(losses)) / window
    assert float(variants["wide"][f"{key}/mean"]) == pytest.approx(mean_loss, rel=1e-9)
    assert cells(page, "### At equal training FLOPs", "wide")[5] == f"{plain / wide * TOKENS * STEPS / 1000:.3g}k"


def test_the_same_runs_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    assert main([str(root), "--out", str(tmp_path / "again" / "report")]) == 0
    for name in ("runs.csv", "variants.csv", "curves.png", "final.png"):
        assert (tmp_path / "again" / "report" / name).read_bytes() == (root / "report" / name).read_bytes(), name


def test_what_is_not_finished_is_listed_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "some"
    runs = [run for run in make_sweep().runs() if run.name != "wide"]
    write_manifest(folder, "plain", runs)
    for run in runs:
        if (run.name, run.seed) in (("plain", 0), ("plain", 1), ("fast", 0)):
            write_run(folder / run.folder, run.config, FINAL[run.name][run.seed])
    late = runs[-1]
    write_run(folder / late.folder, late.config, 2.0, steps=40, finished=False)
    write_end(folder, late.folder, 2, "loss | not finite")
    write_run(folder / "old" / "seed-0", dataclasses.replace(runs[0].config, batch_size=4), 1.0)
    (folder / "torn" / "seed-0").mkdir(parents=True)
    (folder / "torn" / "seed-0" / "config.json").write_text('{"type": "moe.train.run:RunConfig", "stepz": 3}')
    assert main([str(folder)]) == 0
    page = (folder / "report" / "report.md").read_text()
    end = page.partition("## Not in the numbers above")[2]
    assert "| `fast, seed 2` | 40 of 100 | not finished: loss \\| not finite |" in end
    assert "| `plain, seed 2` | 0 of 100 | not started |" in end
    assert "`old, seed 0`" in end and "not in the sweep as it was last started" in end
    assert "`torn, seed 0`" in end
    assert cells(page, "## Paired with", "fast") == ["-0.1000", "–", "–", "–", "1"]
    assert len(rows(folder / "report" / "runs.csv")) == 8
    states = {(row["variant"], row["seed"]): row["state"] for row in rows(folder / "report" / "runs.csv")}
    assert states["fast", "1"] == "not started" and states["plain", "0"] == "finished"


def test_run_folders_are_grouped_by_their_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_sweep((0,)).runs()[0].config
    moved = dataclasses.replace(base, seed=1, data=dataclasses.replace(base.data, cache_dir="/elsewhere"))
    write_run(tmp_path / "x-seed0", base, 2.0)
    write_run(tmp_path / "other", moved, 2.2)
    write_run(tmp_path / "deep" / "y" / "seed-3", dataclasses.replace(base, seed=3, batch_size=4), 3.0)
    found = read_runs([tmp_path / "x-seed0", tmp_path / "other", tmp_path / "deep"])
    assert {name: [run.seed for run in group] for name, group in found.finished.items()} == {"x": [0, 1], "y": [3]}
    folders = [str(tmp_path / name) for name in ("x-seed0", "other", "deep")]
    assert main(folders) == 2
    assert "out: is missing; with 3 folders" in capsys.readouterr().err
    page = tmp_path / "docs" / "page.md"
    assert main([*folders, "--out", str(page), "--baseline", "y", "--remark", "One machine."]) == 0
    text = page.read_text()
    assert (
        text.startswith("# page, compared")
        and "![learning curves over tokens and over training FLOPs](page/curves.png)" in text
    )
    assert text.endswith("One machine.\n") and (tmp_path / "docs" / "page" / "variants.csv").is_file()
    assert cells(text, "## Paired with `y`", "x") == ["–", "–", "–", "–", "0"]

    write_run(tmp_path / "twin", dataclasses.replace(moved), 2.2)
    assert main([*folders, str(tmp_path / "twin"), "--out", str(page)]) == 2
    assert "are the same config with seed 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--baseline", "nobody"], "baseline = 'nobody': is none of fast, plain, wide"),
        (["--metric", "nothing"], "metric = 'nothing': is neither in the summary"),
    ],
)
def test_a_wrong_name_is_one_line(root: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root), *words]) == 2
    assert said in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_another_metric_is_compared_and_followed(root: Path, tmp_path: Path) -> None:
    assert main([str(root), "--metric", "load/max_violation", "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert cells(page, "## At the end", "plain")[0] == "0.5000"
    assert cells(page, "### At equal training tokens", "plain")[:3] == ["5.0000", "5.0000", "0.5000"]


def test_options_for_several_runs_are_refused_for_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root / "plain" / "seed-0"), "--baseline", "plain"]) == 2
    assert "baseline = 'plain': is for several runs" in capsys.readouterr().err


def test_of_many_variants_the_baseline_the_best_and_the_last_stand_out() -> None:
    order = [f"v{index}" for index in range(20)]
    assert chosen(order, "v9") == ["v0", "v1", "v2", "v3", "v9", "v19"]
    assert chosen(order, None) == ["v0", "v1", "v2", "v3", "v4", "v19"]
    assert chosen(order, "v19") == ["v0", "v1", "v2", "v3", "v18", "v19"]
    assert chosen(order[:6], "v3") == order[:6]
