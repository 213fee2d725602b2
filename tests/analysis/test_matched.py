"""A metric at equal tokens and at equal FLOPs, by hand."""

import numpy as np
import pytest

from moe.analysis.matched import common_end, track

LOSSES = [4.0, 3.0, 2.0, 1.0]


def records(losses: list[float], tokens: int = 10, name: str = "loss/lm") -> list[dict]:
    return [{"step": step, "tokens": step * tokens, name: loss} for step, loss in enumerate(losses, 1)]


def at(points: list[float], window: float, flops: bool = False, **change: object) -> list[float]:
    one = track(records(LOSSES, **change), str(change.get("name", "loss/lm")), flops_per_token=6)  # type: ignore[arg-type]
    return one.at(np.array(points), window, flops).tolist()


def test_a_loss_is_averaged_over_the_window_before_the_point() -> None:
    """Step k covers tokens 10 (k - 1) to 10 k, at a loss of 5 - k."""
    assert at([10.0, 40.0], 10.0) == [4.0, 1.0]
    assert at([25.0], 10.0) == pytest.approx([(5 * 3.0 + 5 * 2.0) / 10])
    assert at([40.0], 40.0) == pytest.approx([2.5])
    assert at([5.0], 10.0) == pytest.approx([4.0]), "the window begins where training does"


def test_nothing_is_said_beyond_the_end() -> None:
    assert np.isnan(at([40.1], 10.0)).all()
    assert at([40.0 + 1e-12], 10.0) == pytest.approx([1.0])


def test_at_equal_flops_a_cheaper_model_has_seen_more_tokens() -> None:
    """6 FLOPs a token: 120 FLOPs are 20 tokens, the end of step 2. At 12 a token they are the end of step 1."""
    assert at([120.0], 60.0, flops=True) == pytest.approx([3.0])
    dear = track(records(LOSSES), "loss/lm", flops_per_token=12)
    assert dear.at(np.array([120.0]), 60.0, True) == pytest.approx([4.0])
    assert common_end([dear, track(records(LOSSES), "loss/lm", 6)], True) == 240.0
    assert common_end([dear, track(records(LOSSES[:3]), "loss/lm", 6)], False) == 30.0


def test_another_batch_size_changes_nothing_at_equal_tokens() -> None:
    doubled = track(records([loss for loss in LOSSES for _ in range(2)], tokens=5), "loss/lm", 6)
    points = np.array([12.0, 33.0])
    assert doubled.at(points, 7.0, False).tolist() == pytest.approx(at([12.0, 33.0], 7.0))


def test_what_is_measured_now_and_then_is_interpolated() -> None:
    name = "eval/bits_per_byte"
    assert at([15.0, 40.0], 10.0, name=name) == pytest.approx([3.5, 1.0])
    assert np.isnan(at([5.0], 10.0, name=name)).all(), "nothing was measured before"


def test_layers_are_averaged_and_what_is_not_finite_is_left_out() -> None:
    mixed = [
        {"tokens": 10, "load": [1.0, 3.0]},
        {"tokens": 20, "load": [float("nan"), 1.0]},
        {"tokens": 30, "load": [4, 4]},
    ]
    found = track(mixed, "load", 1)
    assert found.tokens.tolist() == [10.0, 30.0] and found.values.tolist() == [2.0, 4.0]
    empty = track(mixed, "loss", 1)
    assert np.isnan(empty.at(np.array([10.0]), 1.0, False)).all() and common_end([found, empty], False) == 0.0
