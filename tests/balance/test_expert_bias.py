"""The expert bias: moves by whole-batch counts, once a step, and touches selection alone.

Guards against: MaxText (sign of device-local counts; up to A updates a step), AXLearn (mean of micro-batch signs),
torchtitan PR #4148 (evaluation tokens in the bias), Megatron #2767 (load that is not the dispatched one).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import ExpertBiasConfig, LoadBalanceConfig, Statistics, load, selection_bias
from moe.balance.statistics import statistics
from moe.config import ConfigError, check
from moe.routing.topk import TopKConfig
from tests import oracle
from tests.balance import examples
from tests.balance.made import made
from tests.balance.test_load_balance import example, routed, sums
from tests.routing.contexts import context_for

BIAS = np.array([0.3, -0.1, 0.0, 0.2, -0.05], np.float32)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("recentre", [False, True])
@pytest.mark.parametrize("scope", ["global", "sequence", 4])
def test_the_update_equals_a_loop_over_groups(rule: Any, recentre: bool, scope: Any) -> None:
    logits, mask = example()
    _, experts = routed(logits, mask)
    config = ExpertBiasConfig(rate=0.01, rule=rule, recentre=recentre, scope=scope)
    whole = jax.tree.map(
        lambda leaf: leaf.reshape(1, 2, 4, *leaf.shape[2:]).swapaxes(0, 1), sums(logits, mask, experts)
    )
    found = config.update({"bias": BIAS[None]}, whole)["bias"][0]
    expected = oracle.expert_bias(experts, mask, BIAS, scope, rule, 0.01, recentre)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def counts(*count_E: int) -> Statistics:
    """The whole batch is one sequence of one layer."""
    return made([[[count_E]]], tokens_B=jnp.array([[[sum(count_E) // 2]]], jnp.int32))


def test_overloaded_experts_go_down_and_balanced_ones_stay() -> None:
    state = {"bias": jnp.zeros((1, 4))}
    sign = ExpertBiasConfig(rate=0.5).update(state, counts(8, 4, 4, 0))["bias"]
    np.testing.assert_array_equal(sign, [[-0.5, 0, 0, 0.5]])
    proportional = ExpertBiasConfig(rate=0.5, rule="proportional").update(state, counts(8, 4, 2, 2))["bias"]
    np.testing.assert_allclose(proportional, [[-0.5, 0, 0.25, 0.25]])


def test_a_balanced_load_moves_nothing_for_any_number_of_experts() -> None:
    """sign() must see an exact zero: XLA may compute c / sum(c) as c * (1 / sum(c)), which is not 1 / E."""
    for E in (3, 5, 6, 7, 12, 48, 60):
        for each in (2, 14, 334):
            moved = ExpertBiasConfig().update({"bias": jnp.zeros((1, E))}, counts(*(each,) * E))["bias"]
            assert not np.asarray(moved).any(), (E, each)


@pytest.mark.parametrize(("rule", "rate"), [("sign", 0.003), ("proportional", 0.02)])
def test_updates_spread_the_load_of_a_skewed_router(rule: Any, rate: float) -> None:
    skew = np.array([2.0, 1.0, 0, 0, -1.0, -2.0])
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 1, (8, 32, 6)) + skew, jnp.float32)
    mask, config = np.ones((8, 32), bool), ExpertBiasConfig(rule=rule, rate=rate)

    def update(state: Any, _: None) -> Any:
        stats = examples.sums(logits, mask, 2, state["bias"][0])
        share_E = load(stats.count_BE[0].sum(axis=0))
        return config.update(state, examples.cut(stats, 2)), (share_E.std() / share_E.mean(), 6 * share_E.max() - 1)

    state, (cv, violation) = jax.jit(lambda: jax.lax.scan(update, {"bias": jnp.zeros((1, 6))}, None, length=200))()
    assert violation[0] > 1.5 and violation[-10:].mean() < 0.2 and cv[-10:].mean() < cv[0] / 8
    assert (np.diff(np.asarray(state["bias"][0])[[0, 2, 5]]) > 0).all()  # up for those who were left out


def test_recentring_leaves_a_mean_of_zero() -> None:
    found = ExpertBiasConfig(rate=0.1, recentre=True).update({"bias": jnp.ones((1, 4))}, counts(9, 3, 2, 2))["bias"]
    np.testing.assert_allclose(found.mean(), 0, atol=1e-7)


def test_a_batch_of_nothing_but_padding_moves_nothing() -> None:
    for rule in ("sign", "proportional"):
        found = ExpertBiasConfig(rule=rule).update({"bias": jnp.asarray(BIAS)[None]}, counts(0, 0, 0, 0, 0))["bias"]
        np.testing.assert_array_equal(found[0], BIAS)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_moves_the_selection_and_never_the_weight(score: Any) -> None:
    router = TopKConfig(score=score, init_std=0.5).build(jax.random.key(0), 16, 8)
    x = jax.random.normal(jax.random.key(1), (2, 12, 16))
    context = context_for(2, 12)
    plain = router(x, context, jnp.zeros(8))
    pushed = router(x, context, jnp.zeros(8).at[3].set(100.0))
    assert (np.asarray(pushed.expert_BR).reshape(2, 12, 2) == 3).any(axis=-1).all()
    assert not (np.asarray(plain.expert_BR).reshape(2, 12, 2) == 3).any(axis=-1).all()
    np.testing.assert_array_equal(plain.probs_BSE, pushed.probs_BSE)
    np.testing.assert_array_equal(plain.log_z_BS, pushed.log_z_BS)
    logits = np.asarray(jnp.einsum("bsd,de->bse", x, router.w_router[...]))
    scores = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.asarray(plain.probs_BSE)
    chosen = np.take_along_axis(scores, np.asarray(pushed.expert_BR).reshape(2, 12, 2), axis=-1)
    np.testing.assert_allclose(np.asarray(pushed.weight_BR).reshape(2, 12, 2), chosen, rtol=2e-5)


def test_no_gradient_reaches_the_bias() -> None:
    router = TopKConfig(init_std=0.5).build(jax.random.key(0), 16, 8)
    x = jax.random.normal(jax.random.key(1), (2, 12, 16))

    def everything(bias: jax.Array) -> jax.Array:
        found = router(x, context_for(2, 12), bias)
        return found.weight_BR.sum() + (found.probs_BSE**2).sum() + found.log_z_BS.sum()

    assert not np.asarray(jax.grad(everything)(0.1 * jnp.arange(8.0))).any()


def test_the_load_is_that_of_the_biased_map_before_drops() -> None:
    router = TopKConfig(init_std=0.5).build(jax.random.key(0), 16, 8)
    x, context = jax.random.normal(jax.random.key(1), (2, 12, 16)), context_for(2, 12, padding=3)
    routing = router(x, context, jnp.zeros(8).at[3].set(100.0))
    dropped = jnp.array([5, 1], jnp.int32)
    found = statistics(routing, context.mask_BS, dropped)
    np.testing.assert_array_equal(found.count_BE[:, 3], [9, 9])
    np.testing.assert_array_equal(found.count_BE.sum(axis=1), [18, 18])
    np.testing.assert_array_equal(found.tokens_B, [9, 9])
    np.testing.assert_array_equal(found.dropped_B, dropped)


def test_biases_of_several_rules_add_up_and_rules_without_one_count_as_zero() -> None:
    rules = (ExpertBiasConfig(name="a"), LoadBalanceConfig(), ExpertBiasConfig(name="b"))
    states = {"a": {"bias": jnp.ones((2, 3))}, "load_balance": {}, "b": {"bias": 2 * jnp.ones((2, 3))}}
    np.testing.assert_array_equal(selection_bias(rules, states, np.ones((2, 3), bool)), 3 * np.ones((2, 3)))
    np.testing.assert_array_equal(selection_bias((), {}, np.ones((2, 3), bool)), np.zeros((2, 3)))


def test_a_coefficient_or_a_rate_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"coefficient = 0.1: must be 0"):
        check(ExpertBiasConfig(coefficient=0.1))
    with pytest.raises(ConfigError, match=r"rate = 0: must be greater than 0"):
        check(ExpertBiasConfig(rate=0))
