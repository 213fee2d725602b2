"""Entropy and importance against numpy, their ranges, and the difference between a batch's mean and means of parts.

Guards against: the entropy of each device's or micro-batch's mean in place of the batch's (Jensen), 0 log 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import EntropyConfig, ImportanceConfig
from moe.config import ConfigError, check
from tests.balance.examples import layers, logits_and_mask, sums, whole_term

E = 6
RULES = (EntropyConfig, ImportanceConfig)


def oracle(rule: type, probs_GSE: np.ndarray, mask_GS: np.ndarray, n: int) -> float:
    """Group by group, as the definitions read."""
    total = 0.0
    for first in range(0, len(mask_GS), n):
        tokens = probs_GSE[first : first + n][mask_GS[first : first + n]]
        if not len(tokens):
            continue
        sums_E = tokens.sum(axis=0)
        P = sums_E / sums_E.sum()
        h = float((P * np.log(P)).sum()) if rule is EntropyConfig else float((np.std(sums_E) / np.mean(sums_E)) ** 2)
        total += len(tokens) / mask_GS.sum() * h
    return total


def value(rule: Any, logits: Any, mask: np.ndarray, A: int = 1) -> float:
    found = whole_term(rule, sums(jnp.asarray(logits, jnp.float32), mask), A)[0]
    assert found is not None
    return float(found[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("scope", "n"), [("sequence", 1), (2, 2), (4, 4), ("global", 8)])
def test_the_value_is_the_definition_group_by_group(rule: Any, scope: Any, n: int) -> None:
    logits, mask = logits_and_mask(E=E)
    probs = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    for A in (1, 4):
        np.testing.assert_allclose(value(rule(scope=scope), logits, mask, A), oracle(rule, probs, mask, n), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_mean_of_the_values_of_micro_batches_is_another_number(rule: Any) -> None:
    logits, mask = logits_and_mask(E=E)
    probs = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    parts = oracle(rule, probs, mask, 2)
    assert parts > oracle(rule, probs, mask, 8) + 0.05  # Jensen: both are convex
    assert abs(value(rule(), logits, mask, 4) - parts) > 0.05


@pytest.mark.parametrize(("rule", "best", "worst"), [(EntropyConfig, -np.log(4), 0.0), (ImportanceConfig, 0.0, 3.0)])
def test_uniform_means_are_the_minimum_and_collapse_the_maximum(rule: Any, best: float, worst: float) -> None:
    """A balanced one-hot router is as good as a uniform one."""
    mask = np.ones((4, 3), bool)
    one_hot, collapsed = np.zeros((4, 3, 4)), np.zeros((4, 3, 4))
    one_hot[np.arange(4), :, np.arange(4)] = collapsed[..., 1] = 200.0
    np.testing.assert_allclose(value(rule(), np.zeros((4, 3, 4)), mask), best, atol=1e-6)
    np.testing.assert_allclose(value(rule(), one_hot, mask), best, atol=1e-6)
    np.testing.assert_allclose(value(rule(), collapsed, mask), worst, atol=1e-5)
    # Within a sequence the one-hot router is collapsed.
    np.testing.assert_allclose(value(rule(scope="sequence"), one_hot, mask), worst, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_logit_gradient_has_the_closed_form(rule: Any) -> None:
    """d h / d z_tm = (1 / n) p_tm (h'_m - sum_i h'_i p_ti), h' = log P + 1 or 2 E (P - 1 / E)."""
    logits, mask = logits_and_mask(E=E)
    p = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    P = p[mask].mean(axis=0)
    slope = np.log(P) + 1 if rule is EntropyConfig else 2 * E * (P - 1 / E)
    expected = np.where(mask[..., None], p * (slope - (p @ slope)[..., None]) / mask.sum(), 0.0)
    for A in (1, 2, 8):
        found = jax.grad(lambda z, A=A: whole_term(rule(), sums(z, mask), A)[0].sum())(logits)
        np.testing.assert_allclose(found, expected, atol=2e-7)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_an_expert_without_any_probability_gives_finite_numbers(rule: Any) -> None:
    logits = np.zeros((4, 3, 4), np.float32)
    logits[..., 2] = -500.0
    mask = np.ones((4, 3), bool)
    for A in (1, 2):
        found, slope = jax.value_and_grad(lambda z, A=A: whole_term(rule(), sums(z, mask), A)[0].sum())(
            jnp.asarray(logits)
        )
        np.testing.assert_allclose(found, -np.log(3) if rule is EntropyConfig else 1 / 3, rtol=1e-5)
        assert np.isfinite(slope).all()


def test_a_narrow_layer_is_at_its_best_at_its_own_number_of_experts() -> None:
    mask = np.ones((2, 3), bool)
    both = layers(sums(jnp.zeros((2, 3, 6)), mask), sums(jnp.zeros((2, 3, 4)), mask))
    np.testing.assert_allclose(whole_term(EntropyConfig(), both, 2)[0], [-np.log(6), -np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(whole_term(ImportanceConfig(), both, 2)[0], [0, 0], atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_work_is_refused(rule: Any) -> None:
    with pytest.raises(ConfigError, match="coefficient = -1: must be at least 0"):
        check(rule(coefficient=-1))
    with pytest.raises(ConfigError, match="scope = 0: must be"):
        check(rule(scope=0))
    assert next(rule(scope=5).batch_problems(2, 4))[0] == "scope"
    assert rule().needs_prepass(2, 4) and not rule(scope=4).needs_prepass(2, 4) and not rule().needs_prepass(1, 8)
