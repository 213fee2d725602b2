"""Soft routing: every expert, weighted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.balance.statistics import load, statistics
from moe.dispatch import DenseConfig, DispatchConfig, DroplessConfig, ExpertWeights
from moe.routing.base import Router, RouterConfig
from moe.routing.soft import SoftConfig
from moe.routing.topk import TopKConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [SoftConfig(), SoftConfig(init_std=0.1)]
B, S, D, E, F = 2, 6, 8, 4, 8


def router(config: RouterConfig) -> Router:
    built = config.build(jax.random.key(0), D, E)
    return param.bind(built, jax.tree.map(lambda w: 40 * w, param.pure(built)))


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, S, D))


def experts(count: int) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(4), 3)
    shapes = ((count, D, F), (count, D, F), (count, F, D))
    return ExpertWeights(*(0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def mlp(x: np.ndarray, weights: ExpertWeights, expert: int) -> np.ndarray:
    gate, up, down = (np.asarray(w[expert], np.float64) for w in weights)
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


@pytest.mark.parametrize("dispatch", [DenseConfig(), DroplessConfig()], ids=["dense", "dropless"])
def test_the_output_is_the_softmax_weighted_sum_of_all_experts(dispatch: DispatchConfig) -> None:
    soft, weights, x = router(SoftConfig()), experts(E), np.asarray(tokens(), np.float64)
    y, _ = dispatch.build()(tokens(), soft(tokens(), context_for(B, S), jnp.zeros(E)), weights)
    z = x @ np.asarray(param.pure(soft)["w_router"], np.float64)
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    expected = sum(p[..., e : e + 1] * mlp(x, weights, e) for e in range(E))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_identical_experts_are_one_expert_unlike_under_top_1() -> None:
    weights, x = experts(1), np.asarray(tokens(), np.float64)
    same = ExpertWeights(*(jnp.broadcast_to(w, (E, *w.shape[1:])) for w in weights))
    expected, outputs = mlp(x, weights, 0), {}
    for name, config in (("soft", SoftConfig()), ("top 1", TopKConfig(num_selected=1))):
        routing = router(config)(tokens(), context_for(B, S), jnp.zeros(E))
        outputs[name], _ = DenseConfig().build()(tokens(), routing, same)
    np.testing.assert_allclose(outputs["soft"], expected, rtol=1e-4, atol=1e-6)
    off = np.linalg.norm(outputs["top 1"] - expected) / np.linalg.norm(expected)
    assert off > 0.01, "an un-renormalised top-1 probability should scale the output down"


def test_the_load_is_uniform_and_nothing_is_selected() -> None:
    context = context_for(B, S, padding=2)
    routing = router(SoftConfig())(tokens(), context, 5 * jnp.arange(E, dtype=jnp.float32))
    sums = statistics(routing, context.mask_BS, jnp.zeros((B,), jnp.int32))
    np.testing.assert_array_equal(sums.count_BE, np.full((B, E), S - 2))
    np.testing.assert_array_equal(load(sums.count_BE), np.full((B, E), 0.25))
    assert np.isinf(routing.margin_BS).all() and SoftConfig().experts_per_token(E) == E
    plain = router(SoftConfig())(tokens(), context, jnp.zeros(E))
    jax.tree.map(np.testing.assert_array_equal, routing, plain)  # the bias moved nothing
