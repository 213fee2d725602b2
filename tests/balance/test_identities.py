"""What the losses cannot see, and where they are at rest: by hand.

Guards against: a load-balance loss read as bounded below by 1, a z-loss that leaves the common shift of logits free.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import EntropyConfig, ImportanceConfig, LoadBalanceConfig, ZLossConfig
from tests.balance.examples import logits_and_mask, sums, whole_term
from tests.balance.made import made

UNIFORM, SKEWED, OPPOSED = [0.25] * 4, [0.75, 0.25, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("f", "P", "expected"),
    [
        (SKEWED, UNIFORM, 1.0),
        (UNIFORM, SKEWED, 1.0),
        (SKEWED, SKEWED, 4 * (0.75**2 + 0.25**2)),
        (SKEWED, OPPOSED, 4 * (0.075 + 0.05)),
    ],
)
def test_the_loss_is_one_where_load_or_probability_is_uniform_and_below_where_they_disagree(
    f: list[float], P: list[float], expected: float
) -> None:
    T, K = 8, 2
    stats = made(
        np.multiply(f, T * K)[None, None], prob_BE=T * jnp.array(P)[None, None], tokens_B=jnp.array([[T]], jnp.int32)
    )
    np.testing.assert_allclose(whole_term(LoadBalanceConfig(), stats)[0], [expected], rtol=1e-6)


def along_a_shift(rule: Any, shift_GS: Any) -> tuple[jax.Array, np.ndarray]:
    """(value, its gradient in a number added to all logits of a token)."""
    logits, mask = logits_and_mask()
    value = lambda shift: whole_term(rule, sums(logits + shift[..., None], mask))[0][0]  # noqa: E731
    found, gradient = jax.value_and_grad(value)(jnp.asarray(shift_GS))
    return found, np.asarray(gradient)


def test_the_z_loss_pulls_on_the_common_shift_of_logits_until_the_logsumexp_is_zero() -> None:
    logits, mask = logits_and_mask()
    log_z_GS = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=-1))
    _, pull = along_a_shift(ZLossConfig(), np.zeros(mask.shape, np.float32))
    np.testing.assert_allclose(pull, np.where(mask, 2 * log_z_GS / mask.sum(), 0.0), rtol=1e-5, atol=1e-7)
    value, rest = along_a_shift(ZLossConfig(), -log_z_GS.astype(np.float32))
    assert float(value) < 1e-12 and np.abs(rest).max() < 1e-6 < 1e-2 < np.abs(pull).max()


@pytest.mark.parametrize("rule", [LoadBalanceConfig(), EntropyConfig(), ImportanceConfig()])
def test_no_rule_of_probabilities_sees_the_common_shift(rule: Any) -> None:
    _, mask = logits_and_mask()
    at_zero, pull = along_a_shift(rule, np.zeros(mask.shape, np.float32))
    moved, _ = along_a_shift(rule, np.full(mask.shape, 3.0, np.float32))
    np.testing.assert_allclose(moved, at_zero, rtol=1e-5)
    assert np.abs(pull).max() < 1e-6
