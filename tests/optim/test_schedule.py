"""Learning-rate schedules at points worked out by hand."""

import numpy as np
import pytest

from moe.config import ConfigError, check
from moe.optim import WarmupCosineConfig, WarmupStableDecayConfig


def at(schedule: object, *steps: int) -> list[float]:
    return [float(schedule(step)) for step in steps]  # type: ignore[operator]


def test_warm_up_then_half_a_cosine() -> None:
    # 10 steps of warm-up, 100 left: at a quarter of them cos(pi/4), half way the mean of peak and end.
    schedule = WarmupCosineConfig(warmup_steps=10, final_fraction=0.1).build(2.0, 110)
    quarter = 0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(at(schedule, 0, 5, 10, 35, 60, 110, 500), [0, 1, 2, quarter, 1.1, 0.2, 0.2], rtol=1e-5)


def test_no_warm_up_starts_at_the_peak() -> None:
    np.testing.assert_allclose(at(WarmupCosineConfig(warmup_steps=0).build(2.0, 100), 0, 100), [2.0, 0.2], rtol=1e-5)
    schedule = WarmupStableDecayConfig(warmup_steps=0, decay_steps=20).build(2.0, 100)
    np.testing.assert_allclose(at(schedule, 0, 50, 80), [2.0, 2.0, 2.0], rtol=1e-5)


def test_warm_up_stable_then_a_linear_decay() -> None:
    schedule = WarmupStableDecayConfig(warmup_steps=10, decay_steps=40, final_fraction=0.5).build(2.0, 100)
    np.testing.assert_allclose(at(schedule, 0, 5, 10, 59, 60, 80, 100), [0, 1, 2, 2, 2, 1.5, 1.0], rtol=1e-5)


def test_the_last_step_is_one_short_of_the_end() -> None:
    # Steps count from 0: the last of 100 has one more hundredth, or one tenth of the decay, to go.
    stable = WarmupStableDecayConfig(warmup_steps=0, decay_steps=10, final_fraction=0.5).build(2.0, 100)
    np.testing.assert_allclose(at(stable, 99), [1.1], rtol=1e-5)
    cosine = WarmupCosineConfig(warmup_steps=0, final_fraction=0.0).build(2.0, 100)
    np.testing.assert_allclose(at(cosine, 99), [1 + np.cos(np.pi * 0.99)], rtol=1e-3)


@pytest.mark.parametrize("config", [WarmupCosineConfig(), WarmupStableDecayConfig()], ids=["cosine", "stable"])
def test_the_rate_rises_to_the_peak_and_falls_from_there(config: WarmupCosineConfig | WarmupStableDecayConfig) -> None:
    rates = np.array(at(config.build(2.0, 400), *range(0, 400, 10)))
    assert rates.max() == 2.0 and rates.min() == 0.0
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) <= 0).all()


def test_a_warm_up_that_does_not_fit_the_run_is_a_problem() -> None:
    assert list(WarmupCosineConfig(warmup_steps=100).run_problems(100)) == [
        ("warmup_steps", "must be less than steps = 100")
    ]
    problems = list(WarmupStableDecayConfig(warmup_steps=10, decay_steps=95).run_problems(100))
    assert problems == [("decay_steps", "must be at most steps - warmup_steps = 90")]
    with pytest.raises(ConfigError, match=r"final_fraction = 2: must be between 0 and 1"):
        check(WarmupCosineConfig(final_fraction=2))
