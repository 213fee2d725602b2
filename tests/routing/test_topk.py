"""Top-k token choice by hand.

Guards against: Megatron #1545 and OLMo-core PR #255 (sigmoid scores pushed under the epsilon escape the balance loss),
Megatron #1971 (softmax with bias refused), MaxText's DeepSeek router (softmax of sigmoid scores plus bias as P).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.base import LinearRouter, RouterConfig, Routing
from moe.routing.choice import softmax
from moe.routing.topk import TopKConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    TopKConfig(),
    TopKConfig(num_selected=1),
    TopKConfig(num_selected=2, normalise="sum", jitter=0.05),
    TopKConfig(num_selected=8, normalise="softmax"),
    TopKConfig(num_selected=2, score="sigmoid"),
    TopKConfig(
        num_selected=3, score="sigmoid", normalise="sum", scale=2.5, num_groups=4, num_groups_selected=2, jitter=0.01
    ),
    TopKConfig(num_selected=2, num_groups=4, num_groups_selected=2, group_score="max"),
]

LOGITS = np.log(np.array([8.0, 4.0, 2.0, 1.0, 1.0], np.float32))  # softmax: 1/2 1/4 1/8 1/16 1/16


def route(logits_E: Any, bias_E: Any = None, padding: int = 0, **fields: Any) -> Routing:
    """One sequence of one token (and `padding` more) with exactly these logits: x = 1, w_router = the logits."""
    logits_E = jnp.asarray(logits_E, jnp.float32)
    E = logits_E.shape[0]
    router = param.bind(LinearRouter(TopKConfig(**fields), jax.random.key(0), 1, E), {"w_router": logits_E[None]})
    context = context_for(1, 1 + padding, padding=padding)
    return router(jnp.ones((1, 1 + padding, 1)), context, jnp.zeros(E) if bias_E is None else jnp.asarray(bias_E))


SIGMOID = [8 / 9, 4 / 5, 2 / 3, 1 / 2, 1 / 2]  # sigmoid(log x) = x / (1 + x)
CASES = [
    ("softmax", "none", [1 / 2, 1 / 4]),
    ("softmax", "sum", [2 / 3, 1 / 3]),
    ("softmax", "softmax", [2 / 3, 1 / 3]),
    ("sigmoid", "none", SIGMOID[:2]),
    ("sigmoid", "sum", [10 / 19, 9 / 19]),  # 8/9 : 4/5 = 40 : 36
]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("score", "normalise", "weights"), CASES)
def test_weights_have_their_hand_derived_values(score: Any, normalise: Any, weights: list[float], scale: float) -> None:
    found = route(LOGITS, score=score, normalise=normalise, scale=scale)
    np.testing.assert_array_equal(found.expert_BR, [[0, 1]])
    np.testing.assert_array_equal(found.token_BR, [[0, 0]])
    np.testing.assert_allclose(found.weight_BR[0], scale * np.array(weights), rtol=2e-6)


def test_probabilities_sum_to_one_over_all_experts() -> None:
    np.testing.assert_allclose(route(LOGITS).probs_BSE[0, 0], [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], rtol=1e-6)
    sigmoid = np.array(SIGMOID)
    np.testing.assert_allclose(route(LOGITS, score="sigmoid").probs_BSE[0, 0], sigmoid / sigmoid.sum(), rtol=1e-6)


def test_log_z_is_the_logsumexp_of_the_logits() -> None:
    for score in ("softmax", "sigmoid"):
        np.testing.assert_allclose(route(LOGITS, score=score).log_z_BS, [[np.log(16.0)]], rtol=1e-6)


def test_the_margin_is_the_last_score_taken_minus_the_first_left_out() -> None:
    np.testing.assert_allclose(route(LOGITS).margin_BS, [[1 / 4 - 1 / 8]], rtol=1e-5)
    np.testing.assert_allclose(route(LOGITS, score="sigmoid").margin_BS, [[4 / 5 - 2 / 3]], rtol=1e-5)
    np.testing.assert_allclose(route(LOGITS, bias_E=[0, 0, 0.1, 0, 0]).margin_BS, [[1 / 4 - 1 / 8 - 0.1]], rtol=1e-5)
    assert np.isinf(route(LOGITS, num_selected=5).margin_BS).all()
    assert np.isinf(np.asarray(route(LOGITS, padding=2).margin_BS)[0, 1:]).all()


def test_a_bias_selects_and_the_weight_stays_the_plain_score() -> None:
    found = route(LOGITS, bias_E=[0, 0, 0, 1, 0], normalise="none")
    np.testing.assert_array_equal(found.expert_BR, [[3, 0]])
    np.testing.assert_allclose(found.weight_BR, [[1 / 16, 1 / 2]], rtol=1e-5)


def test_softmax_weights_divided_by_their_sum_are_the_softmax_of_the_chosen_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 16)
    for K in (2, 5, 16):
        a = route(logits, num_selected=K, normalise="sum").weight_BR
        b = route(logits, num_selected=K, normalise="softmax").weight_BR
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a.sum(), 1.0, rtol=1e-6)


def test_pushing_all_sigmoid_scores_towards_zero_does_not_reduce_the_probabilities() -> None:
    """With s / (sum(s) + epsilon) the sum would fall to 0 at a shift of -60, and the balance loss with it."""
    for shift in (-20.0, -60.0, -95.0):
        found = route(LOGITS + shift, score="sigmoid", normalise="sum")
        np.testing.assert_allclose(found.probs_BSE.sum(), 1.0, rtol=1e-5)
        # Far below 0 sigmoid is exp: the probabilities are the softmax.
        np.testing.assert_allclose(found.probs_BSE[0, 0], [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], rtol=1e-4)
        np.testing.assert_allclose(found.weight_BR.sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_extreme_logits_give_finite_values_and_gradients(score: Any, size: float) -> None:
    def everything(logits: jax.Array) -> jax.Array:
        found = route(logits, score=score, normalise="sum")
        return found.weight_BR.sum() + (found.probs_BSE**2).sum() + found.log_z_BS.sum()

    logits = size * jnp.array([1.0, 0.5, 0.25, 0.1])
    assert np.isfinite(everything(logits)) and np.isfinite(jax.grad(everything)(logits)).all()


def test_scores_are_float32_whatever_the_compute_dtype() -> None:
    """bfloat16 holds 8 bits: logits computed in it would tie experts that differ by less than 1 / 256."""
    router = TopKConfig(init_std=0.02).build(jax.random.key(0), 64, 8)
    x = jax.random.normal(jax.random.key(1), (1, 4, 64)).astype(jnp.bfloat16)
    found = router(x, context_for(1, 4), jnp.zeros(8))
    for value in (found.weight_BR, found.probs_BSE, found.log_z_BS, found.margin_BS):
        assert value.dtype == jnp.float32
    exact = np.asarray(x, np.float64)[0] @ np.asarray(router.w_router[...], np.float64)
    np.testing.assert_allclose(found.log_z_BS[0], np.log(np.exp(exact).sum(-1)), rtol=1e-6)


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"normalise = 'softmax': softmax over the chosen logits ignores"):
        check(TopKConfig(score="sigmoid", normalise="softmax"))
    with pytest.raises(ConfigError, match=r"normalise = 'sum': must be 'none' when num_selected is 1"):
        check(TopKConfig(num_selected=1, normalise="sum"))
    with pytest.raises(ConfigError, match=r"num_selected = 0: must be at least 1"):
        check(TopKConfig(num_selected=0))
    with pytest.raises(ConfigError, match=r"scale = 0: must be greater than 0"):
        check(TopKConfig(scale=0))


# Six experts in three groups: selection scores 0.30 0.01 | 0.20 0.19 | 0.25 0.05 (softmax of their logarithms).
GROUPED = np.log(np.array([0.30, 0.01, 0.20, 0.19, 0.25, 0.05], np.float32))


def test_the_best_groups_are_chosen_by_their_two_best_experts_or_by_the_best_one() -> None:
    two = {"num_groups": 3, "num_groups_selected": 1}
    # Sums of two: 0.31, 0.39, 0.30; maxima: 0.30, 0.20, 0.25.
    np.testing.assert_array_equal(route(GROUPED, **two).expert_BR, [[2, 3]])
    np.testing.assert_array_equal(route(GROUPED, group_score="max", **two).expert_BR, [[0, 1]])
    two["num_groups_selected"] = 2
    np.testing.assert_array_equal(route(GROUPED, **two).expert_BR, [[0, 2]])
    np.testing.assert_array_equal(route(GROUPED, group_score="max", **two).expert_BR, [[0, 4]])


def test_groups_move_the_selection_and_neither_weights_nor_probabilities() -> None:
    plain, grouped = route(GROUPED), route(GROUPED, num_groups=3, num_groups_selected=1)
    np.testing.assert_allclose(grouped.weight_BR, [[0.20, 0.19]], rtol=1e-5)
    np.testing.assert_array_equal(grouped.probs_BSE, plain.probs_BSE)
    assert np.isinf(grouped.margin_BS).all(), "both experts of the one open group are taken"
    found = route(GROUPED, num_groups=3, num_groups_selected=2, num_selected=3)
    np.testing.assert_allclose(found.margin_BS, [[0.19 - 0.01]], rtol=1e-4)


def test_the_bias_enters_the_score_of_a_group() -> None:
    fields = {"num_groups": 3, "num_groups_selected": 1}
    found = route(GROUPED, bias_E=[0, 0.1, 0, 0, 0, 0], **fields)  # 0.30 + 0.11 > 0.39
    np.testing.assert_array_equal(found.expert_BR, [[0, 1]])
    np.testing.assert_allclose(found.weight_BR, [[0.30, 0.01]], rtol=1e-5)


def test_every_token_stays_within_its_best_groups_as_a_slow_loop_finds_them() -> None:
    rng = np.random.default_rng(0)
    for logits in rng.normal(0, 2, (4, 12)):
        bias = rng.normal(0, 0.2, 12)
        score = 1 / (1 + np.exp(-logits)) + bias
        groups = sorted(range(4), key=lambda g: -np.sort(score[3 * g : 3 * g + 3])[-2:].sum())[:2]
        open_experts = [e for e in range(12) if e // 3 in groups]
        expected = sorted(open_experts, key=lambda e: -score[e])[:4]
        found = route(logits, bias, score="sigmoid", num_groups=4, num_groups_selected=2, num_selected=4)
        np.testing.assert_array_equal(found.expert_BR[0], expected)


def test_renaming_with_groups_keeps_groups_together() -> None:
    config = TopKConfig(num_groups=4, num_groups_selected=2)
    orders = [np.asarray(config.permutation(jax.random.key(seed), 12)) for seed in range(8)]
    for order in orders:
        assert sorted(order) == list(range(12))
        assert all(len({e // 3 for e in order[3 * g : 3 * g + 3]}) == 1 for g in range(4))
    assert len({tuple(order // 3) for order in orders}) > 1 and len({tuple(order % 3) for order in orders}) > 1


def test_jitter_scales_every_input_within_its_bounds_and_only_in_training() -> None:
    config, x = TopKConfig(jitter=0.1), jnp.ones((2, 16, 8))
    found = np.asarray(config.inputs(x, context_for(2, 16)))
    assert found.min() >= 0.9 and found.max() <= 1.1 and found.std() > 0.04  # uniform: 0.2 / sqrt(12) = 0.058
    np.testing.assert_allclose(found.mean(), 1.0, atol=0.02)
    np.testing.assert_array_equal(config.inputs(x, context_for(2, 16, train=False)), x)
    np.testing.assert_array_equal(TopKConfig().inputs(x, context_for(2, 16)), x)


def test_groups_and_jitter_that_cannot_work_are_refused() -> None:
    for fields, message in [
        ({"num_groups_selected": 2}, r"num_groups_selected = 2: must be at most num_groups = 1"),
        ({"num_groups": 2, "num_groups_selected": 2}, r"num_groups_selected = 2: must be less than num_groups = 2"),
        ({"group_score": "max"}, r"group_score = 'max': is ignored when num_groups is 1"),
        ({"num_groups": 0}, r"num_groups = 0: must be at least 1"),
        ({"jitter": 1.0}, r"jitter = 1.0: must be less than 1"),
        ({"jitter": -0.1}, r"jitter = -0.1: must be at least 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check(TopKConfig(**fields))
    assert dict(TopKConfig(num_groups=3).layer_problems(8)) == {"num_groups": "must divide num_experts = 8"}
    limit = dict(TopKConfig(num_groups=4, num_selected=3).layer_problems(8))
    assert limit == {"num_selected": "must be at most 2: 1 groups of 2 experts can be chosen"}
    assert (
        "needs groups of 2 experts" in dict(TopKConfig(num_groups=8, num_selected=1).layer_problems(8))["group_score"]
    )
    assert not dict(TopKConfig(num_groups=8, num_selected=1, group_score="max").layer_problems(8))


def test_the_gradient_of_softmax_is_that_of_its_three_results_taken_apart() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    weights = jax.random.normal(jax.random.key(1), (2, 2, 3, 5))

    def loss(log_p: jax.Array, p: jax.Array, log_z: jax.Array) -> jax.Array:
        return (weights[0] * log_p).sum() + (weights[1] * p).sum() + jnp.square(log_z).sum()

    def apart(logits: jax.Array) -> jax.Array:
        return loss(jax.nn.log_softmax(logits), jax.nn.softmax(logits), jax.nn.logsumexp(logits, axis=-1))

    value, gradient = jax.value_and_grad(apart)(logits)
    found_value, found = jax.value_and_grad(lambda logits: loss(*softmax(logits)))(logits)
    np.testing.assert_allclose(found_value, value, rtol=1e-6)
    np.testing.assert_allclose(found, gradient, atol=1e-6)
