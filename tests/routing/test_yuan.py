"""The attention router against a loop in numpy, and the bounds and ties its formula has.

Guards against: a factor 1 / sqrt(width) that the method does not have, weights that are not normalised over the chosen.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.base import RouterConfig
from moe.routing.yuan import AttentionRouter, YuanConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [YuanConfig(), YuanConfig(num_selected=3)]
B, S, D, E = 2, 5, 6, 7


def router(**changes: np.ndarray) -> tuple[AttentionRouter, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.7, (D, E)).astype(np.float32) for name in ("w_query", "w_key", "w_value")}
    weights |= changes
    built = YuanConfig().build(jax.random.key(0), D, E)
    return param.bind(built, {name: jnp.asarray(w) for name, w in weights.items()}), weights


X = jax.random.normal(jax.random.key(1), (B, S, D))


def oracle(x_D: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    q, k, v = (x_D.astype(np.float64) @ weights[name] for name in ("w_query", "w_key", "w_value"))
    share = np.exp(np.outer(q, k))
    return (share / share.sum(axis=1, keepdims=True)) @ v


def test_logits_are_attention_between_experts_without_a_scale() -> None:
    found, weights = router()
    z = np.asarray(found.logits(X))
    for b in range(B):
        for s in range(S):
            np.testing.assert_allclose(z[b, s], oracle(np.asarray(X[b, s]), weights), rtol=1e-5, atol=1e-6)


def test_logits_lie_between_the_smallest_and_the_largest_value() -> None:
    found, weights = router()
    z, v = np.asarray(found.logits(X)), np.asarray(X) @ weights["w_value"]
    assert (z >= v.min(axis=-1, keepdims=True) - 1e-5).all() and (z <= v.max(axis=-1, keepdims=True) + 1e-5).all()
    assert z.std(axis=-1).min() > 0


@pytest.mark.parametrize("zero", ["w_query", "w_key"])
def test_without_queries_or_keys_all_experts_tie_at_the_mean_value(zero: str) -> None:
    found, weights = router(**{zero: np.zeros((D, E), np.float32)})
    mean = (np.asarray(X) @ weights["w_value"]).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(found.logits(X), np.broadcast_to(mean, (B, S, E)), rtol=1e-5, atol=1e-6)
    routing = found(X, context_for(B, S), jnp.zeros(E))
    np.testing.assert_array_equal(routing.expert_BR, np.tile([0, 1], (B, S)))  # ties: the lower experts, always
    np.testing.assert_allclose(routing.weight_BR, 0.5, rtol=1e-6)


def test_experts_of_equal_query_have_equal_logits() -> None:
    query = np.random.default_rng(3).normal(0, 0.7, (D, E)).astype(np.float32)
    query[:, 5] = query[:, 2]
    z = np.asarray(router(w_query=query)[0].logits(X))
    np.testing.assert_allclose(z[..., 5], z[..., 2], rtol=1e-6)
    assert not np.allclose(z[..., 4], z[..., 2])


def test_renaming_the_columns_of_all_three_matrices_renames_the_logits() -> None:
    found, weights = router()
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    renamed, _ = router(**{name: w[:, order] for name, w in weights.items()})
    np.testing.assert_allclose(renamed.logits(X), np.asarray(found.logits(X))[..., order], rtol=1e-5, atol=1e-6)
    query_alone, _ = router(w_query=weights["w_query"][:, order], w_key=np.roll(weights["w_key"], 1, axis=1))
    assert not np.allclose(query_alone.logits(X), np.asarray(found.logits(X))[..., order], atol=1e-2)


def test_the_default_start_spreads_the_logits_where_a_smaller_one_nearly_ties_them() -> None:
    """At the paper's width: an eighth of the spread of the values, and a hundredth from 0.006 on down."""
    x = jax.random.normal(jax.random.key(2), (1, 32, 2048))

    def spread(config: YuanConfig) -> float:
        built = config.build(jax.random.key(0), 2048, 32)
        return float(built.logits(x).std(axis=-1).mean() / (x @ built.w_value[...]).std(axis=-1).mean())

    assert spread(YuanConfig()) > 0.08 and spread(YuanConfig(init_std=0.006)) < 0.02


def test_weights_are_the_softmax_of_the_chosen_logits_and_probabilities_of_all() -> None:
    found, _ = router()
    routing, z = found(X, context_for(B, S), jnp.zeros(E)), np.asarray(found.logits(X), np.float64)
    chosen = np.argsort(-z, axis=-1)[..., :2]
    np.testing.assert_array_equal(np.asarray(routing.expert_BR).reshape(B, S, 2), chosen)
    odds = np.exp(np.take_along_axis(z, chosen, axis=-1))
    weights = np.asarray(routing.weight_BR).reshape(B, S, 2)
    np.testing.assert_allclose(weights, odds / odds.sum(axis=-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(routing.probs_BSE, np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(routing.log_z_BS, np.log(np.exp(z).sum(axis=-1)), rtol=1e-5)


def test_it_has_three_matrices() -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(param.pure(YuanConfig().build(jax.random.key(0), D, E)))]
    assert shapes == [(D, E)] * 3


def test_the_gradient_is_that_of_the_formula_and_finite_for_large_scores() -> None:
    found, weights = router()
    value = lambda x: (found.logits(x) ** 2).sum()  # noqa: E731
    gradient, step = np.asarray(jax.grad(value)(X)), 1e-4
    for b, s, d in [(0, 0, 0), (1, 3, 4)]:
        moved = [np.array(X[b, s], np.float64) for _ in range(2)]
        moved[0][d] += step
        moved[1][d] -= step
        up, down = (np.square(oracle(x, weights)).sum() for x in moved)
        np.testing.assert_allclose(gradient[b, s, d], (up - down) / (2 * step), rtol=1e-3)
    assert np.isfinite(found.logits(100 * X)).all() and np.isfinite(jax.grad(value)(100 * X)).all()


def test_one_expert_is_refused_because_the_router_could_not_learn() -> None:
    with pytest.raises(ConfigError, match=r"num_selected = 1: must be at least 2"):
        check(YuanConfig(num_selected=1))
    assert dict(YuanConfig(num_selected=9).layer_problems(8)) == {"num_selected": "must be at most num_experts = 8"}
