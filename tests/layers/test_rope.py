"""Rotary positions by complex numbers, partial and interleaved ones, and YaRN's frequencies by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError, check
from moe.layers.rope import RopeConfig, YarnConfig, rotate


def inputs(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def turned(x_H: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotary by complex numbers: dimension i is the real and i + H/2 the imaginary part."""
    half = len(x_H) // 2
    angle = position * theta ** (-np.arange(half) / half)
    pair = (x_H[:half] + 1j * x_H[half:]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag])


def test_rotary_scores_depend_on_the_difference_of_positions_only() -> None:
    x = jnp.asarray(inputs(1, (1, 2, 3, 8)))  # a query and a key, three heads

    def scores(query_position: int, key_position: int) -> np.ndarray:
        y = rotate(x, jnp.array([[query_position, key_position]]), 10_000.0)
        return np.asarray(jnp.einsum("nh,nh->n", y[0, 0], y[0, 1]))

    for difference in (0, 1, 5):
        for shift in (1, 17, 100):
            expected = scores(difference, 0)
            np.testing.assert_allclose(scores(difference + shift, shift), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(scores(1, 0), scores(5, 0), rtol=1e-2)
    assert not np.allclose(scores(1, 0), scores(0, 1), rtol=1e-2)  # the direction counts


def test_rotary_keeps_lengths_and_position_zero() -> None:
    x = jnp.asarray(inputs(2, (1, 4, 2, 8)))
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 4), jnp.int32), 100.0), x)
    y = rotate(x, jnp.arange(4)[None], 100.0)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    by_hand = [turned(np.asarray(x[0, 3, 1]), 3, 100.0)]
    np.testing.assert_allclose(y[0, 3, 1:], by_hand, rtol=1e-5)


def test_neighbours_are_pairs_when_interleaved() -> None:
    x = inputs(3, (1, 3, 2, 8))
    position = jnp.array([[0, 5, 9]])
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # real parts, then imaginary ones
    halves = np.asarray(rotate(jnp.asarray(x[..., order]), position, 100.0))
    found = np.asarray(rotate(jnp.asarray(x), position, 100.0, RopeConfig(interleaved=True)))
    np.testing.assert_array_equal(found[..., order], halves)
    assert not np.allclose(found, rotate(jnp.asarray(x), position, 100.0), rtol=1e-2)


def test_the_first_dimensions_alone_turn_when_a_width_is_given() -> None:
    x = inputs(4, (1, 3, 2, 10))
    position = jnp.array([[1, 5, 9]])
    found = np.asarray(rotate(jnp.asarray(x), position, 100.0, RopeConfig(width=4)))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(found[..., :4], rotate(jnp.asarray(x[..., :4]), position, 100.0))


def test_yarn_of_deepseek_v3_by_hand() -> None:
    """64 dimensions, theta 10000, 4096 positions, factor 40.

    c(r) = 32 ln(4096 / (2 pi r)) / ln 10000: c(32) = 10.47 and c(1) = 22.51, so frequencies 0 to 10 stay, 23 and later
    ones are divided by 40, and those between by a ramp of 13 steps. Scores: (0.1 ln 40 + 1)^2 = 1.36889^2.
    """
    yarn = YarnConfig(interleaved=True)
    plain = 10_000.0 ** (-np.arange(32) / 32)
    ratio = np.asarray(yarn.frequencies(64, 10_000.0)) / plain
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-5)
    for i in range(11, 23):
        np.testing.assert_allclose(ratio[i], 1 - (i - 10) / 13 * (1 - 1 / 40), rtol=1e-5)
    assert yarn.score_scale == pytest.approx(1.36889**2, rel=1e-5)
    assert YarnConfig(mscale=0.0).score_scale == RopeConfig().score_scale == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (RopeConfig(width=3), "width = 3: must be even"),
        (YarnConfig(factor=1.0), "factor = 1.0: must be greater than 1; for 1 use RopeConfig"),
        (YarnConfig(slow=0.0), "slow = 0.0: must be greater than 0"),
        (YarnConfig(fast=1.0), "fast = 1.0: must be greater than slow = 1.0"),
        (YarnConfig(original_length=0), "original_length = 0: must be at least 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: RopeConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(config)
