"""The temperature schedule by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError, check
from moe.routing.temperature import TemperatureConfig

EXP = TemperatureConfig(start=2.0, end=0.5, decay_steps=100, shape="exp")
LINEAR = TemperatureConfig(start=2.0, end=0.5, decay_steps=100, shape="linear")


def at(config: TemperatureConfig, step: int) -> float:
    tau = config.at(jnp.int32(step))
    assert tau.dtype == jnp.float32 and tau.shape == ()
    return float(tau)


def test_values_by_hand() -> None:
    np.testing.assert_allclose([at(EXP, 25), at(EXP, 50)], [2 / 4**0.25, 1.0], rtol=1e-6)  # a factor 4 in 100 steps
    np.testing.assert_allclose([at(LINEAR, 20), at(LINEAR, 50)], [1.7, 1.25], rtol=1e-6)  # 1.5 in 100 steps


@pytest.mark.parametrize("end", [0.5, 0.3, 1e-3])
@pytest.mark.parametrize("shape", ["exp", "linear"])
def test_both_ends_are_exact_and_the_temperature_falls_all_the_way(shape: str, end: float) -> None:
    config = TemperatureConfig(start=2.0, end=end, decay_steps=37, shape=shape)  # type: ignore[arg-type]
    taus = [at(config, step) for step in range(38)]
    assert taus[0] == 2.0 and taus[-1] == at(config, 38) == at(config, 10**9) == np.float32(end)
    assert (np.diff(taus) < 0).all()


def test_equal_ends_are_a_constant() -> None:
    config = TemperatureConfig(start=0.7, end=0.7)
    assert {at(config, step) for step in (0, 3, 10, 99)} == {float(np.float32(0.7))}


def test_schedules_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"end = 0.0: must be greater than 0"):
        check(TemperatureConfig(end=0.0))
    with pytest.raises(ConfigError, match=r"decay_steps = 10: is ignored, as start = end = 0.7"):
        check(TemperatureConfig(start=0.7, end=0.7, decay_steps=10))
    with pytest.raises(ConfigError, match="shape = 'linear': is ignored"):
        check(TemperatureConfig(start=0.7, end=0.7, shape="linear"))
    with pytest.raises(ConfigError, match=r"start = 0.1: must be at least end = 0.3"):
        check(TemperatureConfig(start=0.1))
    with pytest.raises(ConfigError, match=r"decay_steps = 0: must be at least 1"):
        check(TemperatureConfig(decay_steps=0))
