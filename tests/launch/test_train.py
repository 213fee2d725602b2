"""Whole runs through the command line: layouts, starting from another run, frozen parameters, bad numbers, profiles."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import moe
from moe.optim.adamw import parameter_paths
from moe.train.saved import latest_step
from tests.launch.runs import reproducible, run

SHORT = ("--steps", "12", "--checkpoint.every", "4", "--evaluate.every", "4", "--optim.schedule.warmup-steps", "2")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on one device."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(text, workdir, *SHORT)
    return workdir


def by_path(params: object) -> dict[str, np.ndarray]:
    names = jax.tree.leaves(parameter_paths(params))
    return dict(zip(names, map(np.asarray, jax.tree.leaves(params)), strict=True))


def test_eight_devices_and_one_give_the_same_loss_curve_over_50_steps(text: Path, tmp_path: Path) -> None:
    # Warm-up to a small learning rate: at a large one any two float32 summation orders part ways exponentially.
    flags = ("--steps", "50", "--checkpoint.every", "50", "--checkpoint.keep-best", "0", "--evaluate.every", "50")
    flags += ("--optim.learning-rate", "1e-3")
    run(text, tmp_path / "one", *flags, devices=1)
    layout = ("--mesh.fsdp", "4", "--mesh.expert", "2", "--mesh.tensor", "2")
    run(text, tmp_path / "eight", *flags, *layout, devices=8)
    one, eight = (np.array([r["loss"] for r in reproducible(tmp_path / name)]) for name in ("one", "eight"))
    assert len(one) == len(eight) == 50 and one[-1] < one[0] - 0.5
    np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_a_finished_run_leaves_everything_a_reader_wants(finished: Path) -> None:
    for name in ("config.json", "run.json", "metrics.jsonl", "evaluation.json", "summary.json", "report/report.md"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "tensorboard").iterdir()) and list((finished / "report").glob("*.png"))
    record = reproducible(finished)[-1]
    for name in ("loss", "loss/lm", "loss/load_balance", "loss/z", "weight/load_balance", "eval/bits_per_byte"):
        assert isinstance(record[name], float)
    for name in ("load/max_violation", "load/entropy", "load/dead", "load/dropped", "balance/expert_bias/range"):
        assert len(record[name]) == 2  # type: ignore[arg-type]


def test_one_line_loads_model_parameters_and_config(finished: Path) -> None:
    loaded = moe.load(finished)
    assert loaded.step == 12 and loaded.config.steps == 12
    assert loaded.bias_LE.shape == (2, 8) and np.abs(np.asarray(loaded.bias_LE)).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in by_path(loaded.params).values())


def test_the_same_command_again_does_nothing_but_report(text: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    run(text, finished, *SHORT)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_on_another_mesh(text: Path, finished: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run", *SHORT, "--mesh.expert", "2", "--mesh.tensor", "2", devices=4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    assert "resumed at step 8" in run(text, tmp_path / "run", *SHORT, "--mesh.fsdp", "2", devices=2)
    losses = [[r["loss"] for r in reproducible(path)] for path in (finished, tmp_path / "run")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_init_from_takes_parameters_only_and_frozen_ones_do_not_move(
    text: Path, finished: Path, tmp_path: Path
) -> None:
    frozen = ("--optim.lr-scale", "router", "0", "embedding", "0", "experts|w_up", "0.1")
    run(text, tmp_path / "run", *SHORT, "--init-from", str(finished), *frozen[:5], "--seed", "1")
    start, end = by_path(moe.load(finished).params), by_path(moe.load(tmp_path / "run").params)
    assert reproducible(tmp_path / "run")[0]["step"] == 1
    for path in start:
        same = np.array_equal(start[path], end[path])
        assert same == ("router" in path or "embedding" in path), path


def test_a_loss_that_is_not_finite_stops_the_run_after_n_skipped_updates(text: Path, tmp_path: Path) -> None:
    flags = ("--optim.learning-rate", "1e30", "--optim.schedule.warmup-steps", "0", "--max-skipped", "3")
    said = run(text, tmp_path / "run", *flags, status=3)
    assert "3 updates in a row" in said and "max_skipped = 3" in said
    records = reproducible(tmp_path / "run")
    assert [r["skipped_in_row"] for r in records[-3:]] == [1, 2, 3]
    assert not np.isfinite([records[-1]["loss"], records[-1]["grad_norm"]]).all()


def test_profile_writes_a_trace_of_the_chosen_steps(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "run", *SHORT, "--profile", "5", "6")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_the_newest_and_the_best_checkpoints_are_kept(finished: Path) -> None:
    assert latest_step(finished) == 12
    kept = {int(folder.name) for folder in (finished / "checkpoints").iterdir() if folder.name.isdigit()}
    values = {r["step"]: r["eval/bits_per_byte"] for r in reproducible(finished) if "eval/bits_per_byte" in r}
    assert kept == {8, 12} | {min(values, key=values.__getitem__)}  # type: ignore[arg-type]
