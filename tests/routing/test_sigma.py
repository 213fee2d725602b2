"""sigma-MoE routing: scores that do not compete, expert dropout, level initialisation.

Guards against: NaN where dropout leaves fewer than K experts (the plug-in layer masks with minus infinity), dropout in
evaluation, balance probabilities from the sigmoids instead of the raw logits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing import noise
from moe.routing.base import RouterConfig, Routing
from moe.routing.sigma import SigmaConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [SigmaConfig(), SigmaConfig(num_selected=4, dropout=0.1), SigmaConfig(dropout=0.8)]
LOGITS = np.log(np.array([1.0, 4.0, 0.25, 9.0], np.float32))  # sigmoid: 1/2 4/5 1/5 9/10


def route(logits_E: Any = LOGITS, S: int = 1, train: bool = True, bias_E: Any = None, **fields: Any) -> Routing:
    """One sequence of S tokens with exactly these logits."""
    logits_E = jnp.asarray(logits_E, jnp.float32)
    router = SigmaConfig(**fields).build(jax.random.key(0), 1, logits_E.size)
    bias_E = jnp.zeros(logits_E.size) if bias_E is None else jnp.asarray(bias_E, jnp.float32)
    router = param.bind(router, {"w_router": logits_E[None]})
    return router(jnp.ones((1, S, 1)), context_for(1, S, train=train), bias_E)


def kept_by(dropout: float, S: int) -> np.ndarray:
    """[S, E] the mask of `route(S=S, dropout=dropout)`."""
    return np.asarray(noise.uniform(context_for(1, S), LOGITS.size, noise.DROPOUT)[0]) >= dropout


def test_weights_are_the_sigmoids_of_the_best_without_normalisation() -> None:
    found = route()
    np.testing.assert_array_equal(found.expert_BR, [[3, 1]])
    np.testing.assert_allclose(found.weight_BR, [[0.9, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(found.margin_BS, [[0.3]], rtol=1e-5)


def test_a_score_does_not_depend_on_the_other_experts() -> None:
    logits = LOGITS.copy()
    logits[0] = logits[2] = -7.0
    np.testing.assert_array_equal(route(logits).weight_BR, route().weight_BR)


def test_balance_probabilities_are_the_softmax_of_the_raw_logits() -> None:
    odds = np.exp(LOGITS)
    np.testing.assert_allclose(route().probs_BSE[0, 0], odds / odds.sum(), rtol=1e-6)
    np.testing.assert_allclose(route().log_z_BS, [[np.log(odds.sum())]], rtol=1e-6)
    np.testing.assert_allclose(route(S=64, dropout=0.5).probs_BSE, route(S=64).probs_BSE, rtol=1e-6)


def test_dropped_experts_are_not_chosen_and_nothing_is_rescaled() -> None:
    S, score = 400, np.array([0.5, 0.8, 0.2, 0.9])
    found, kept = route(S=S, dropout=0.3), kept_by(0.3, S)
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.04)
    experts, weights = np.asarray(found.expert_BR).reshape(S, 2), np.asarray(found.weight_BR).reshape(S, 2)
    assert {2, 3, 4} <= set(kept.sum(axis=1)), "the draw meets all cases"
    for s in range(S):
        left = sorted(np.flatnonzero(kept[s]), key=lambda e: -score[e])[:2]
        assert experts[s, : len(left)].tolist() == left
        np.testing.assert_allclose(weights[s, : len(left)], score[left], rtol=1e-5)


def test_where_too_few_are_left_dropped_experts_fill_up_with_weight_zero_and_no_nan() -> None:
    S = 200
    found, kept = route(S=S, dropout=0.8), kept_by(0.8, S)
    assert {0, 1} <= set(kept.sum(axis=1)), "the draw meets the case"
    experts, weights = np.asarray(found.expert_BR).reshape(S, 2), np.asarray(found.weight_BR).reshape(S, 2)
    assert (experts < 4).all() and (experts[:, 0] != experts[:, 1]).all()
    assert (weights[~np.take_along_axis(kept, experts, axis=1)] == 0).all()
    assert (weights[np.take_along_axis(kept, experts, axis=1)] > 0).all()
    assert np.isfinite(found.margin_BS).all() and (np.asarray(found.margin_BS) >= 0).all()
    gradient = jax.grad(lambda z: route(z, S=50, dropout=0.8).weight_BR.sum())(jnp.asarray(LOGITS))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    biased = route(S=S, dropout=0.8, bias_E=[50.0, 0, 0, 0])
    first = np.asarray(biased.expert_BR).reshape(S, 2)[:, 0]
    assert kept[np.flatnonzero(kept.any(axis=1)), first[kept.any(axis=1)]].all(), "no bias brings a dropped one first"


def test_evaluation_and_dropout_zero_are_deterministic() -> None:
    plain = route(S=64)
    for other in (route(S=64, dropout=0.9, train=False), route(S=64, train=False)):
        for name in ("expert_BR", "weight_BR", "margin_BS", "probs_BSE"):
            np.testing.assert_array_equal(getattr(other, name), getattr(plain, name), name)


def test_every_expert_starts_with_a_vector_of_one_length_and_the_whole_keeps_its_deviation() -> None:
    key, config = jax.random.key(0), SigmaConfig(init_std=0.3)
    w = np.asarray(config.initial(key, 32, 16))
    norms = np.linalg.norm(w, axis=0)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)
    plain = 0.3 * np.asarray(jax.random.truncated_normal(key, -3.0, 3.0, (32, 16)))
    assert np.linalg.norm(plain, axis=0).std() > 0.05, "the draw by itself is not level"
    np.testing.assert_allclose(w.std(), plain.std(), rtol=1e-6)
    # Directions stay as they were drawn.
    np.testing.assert_allclose(w / norms, plain / np.linalg.norm(plain, axis=0), rtol=1e-5, atol=1e-7)


def test_a_router_may_start_at_zero() -> None:
    w = SigmaConfig(init_std=0.0).initial(jax.random.key(0), 8, 4)
    assert not np.asarray(w).any()


def test_values_that_cannot_work_are_refused() -> None:
    for dropout in (1.0, -0.1):
        with pytest.raises(ConfigError, match=rf"dropout = {dropout}: must be"):
            check(SigmaConfig(dropout=dropout))
