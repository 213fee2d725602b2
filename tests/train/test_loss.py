"""Targets, the loss of a token, and the checks that keep a configured loss from going missing.

Guards against: a configured balance loss that is silently absent (MaxText PRs #3664 and #4829), weights applied twice
(MaxText 2833daba5), losses averaged over micro-batches with other token counts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import BalanceRule, LoadBalanceConfig, ZLossConfig
from moe.models.output import token_losses
from moe.train.loss import real_targets
from moe.train.run import RunConfig
from moe.train.step import batch_gradient
from tests import grid, oracle
from tests.grid import Cut


def test_a_target_is_real_inside_one_document_only() -> None:
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    expected = [[1, 0, 1, 1, 0, 0], [1] * 6, [0] * 6]
    np.testing.assert_array_equal(real_targets(segments), np.array(expected, bool))


def test_the_loss_of_a_token_by_hand() -> None:
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])) + 7.0
    np.testing.assert_allclose(token_losses(logits, jnp.array([[1, 2]])), [[np.log(4), -np.log(0.8)]], rtol=1e-5)
    assert token_losses(logits.astype(jnp.bfloat16), jnp.array([[1, 2]])).dtype == jnp.float32


def test_the_loss_of_a_uniform_model_is_log_vocabulary() -> None:
    np.testing.assert_allclose(token_losses(jnp.zeros((1, 2, 264)), jnp.zeros((1, 2), int)), np.log(264), rtol=1e-6)


def test_the_loss_of_a_batch_is_the_mean_over_its_real_targets() -> None:
    arrays, state, config = grid.batch(), grid.train_state(()), grid.model_config()
    context = oracle.context_of(arrays, key=state.key, step=int(state.step))
    found = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a))(state.params, context, jnp.zeros((2, 8)))
    logits = np.asarray(found.logits, np.float64)
    total, targets = 0.0, 0
    for g in range(grid.SEQUENCES):
        for t in range(grid.POSITIONS):
            here, following = arrays["segment_ids"][g, t : t + 2]
            if here == following > 0:
                total -= logits[g, t, arrays["tokens"][g, t + 1]] - np.log(np.exp(logits[g, t]).sum())
                targets += 1
    found = grid.measure(Cut(accumulation=4), (ZLossConfig(),))
    np.testing.assert_allclose(found.values["lm"], total / targets, rtol=1e-5)


def run(rules: tuple, **model: object) -> None:
    config = RunConfig(batch_size=32, steps=200, balance=rules, model=grid.model_config(**model))
    states = {rule.name: rule.init_state(config.model.exists_LE) for rule in rules}
    state = dataclasses.replace(grid.train_state(()), balance=states)
    arrays = {name: jnp.asarray(value)[None] for name, value in grid.batch().items()}
    jax.eval_shape(lambda s, a: batch_gradient(config, config.model.abstract(), s, a), state, arrays)


def test_a_coefficient_on_a_rule_without_a_loss_raises() -> None:
    run((BalanceRule(name="silent"),))
    with pytest.raises(ValueError, match=r"'silent' has coefficient 0.5 but no loss term"):
        run((BalanceRule(name="silent", coefficient=0.5),))


def test_a_rule_on_a_model_that_returns_no_statistics_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe.train import loss

    original = loss.forward
    monkeypatch.setattr(loss, "forward", lambda *a, **k: original(*a, **k)._replace(statistics=None))
    with pytest.raises(ValueError, match=r"'load_balance' is configured, but the model returned no statistics"):
        run((LoadBalanceConfig(),))
