"""Switch top-1: weight, initialisation, jitter, and random token selection together with a full buffer.

Guards against: top-1 weights normalised to 1 (no task gradient), the end of a sequence dropped first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.dispatch import CapacityConfig, DenseConfig, ExpertWeights
from moe.routing.base import RouterConfig, Routing
from moe.routing.switch import SwitchConfig
from tests.routing import contract
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    SwitchConfig(), SwitchConfig(jitter=0.0, init_std=0.02), SwitchConfig(random_token_selection=True)
]  # fmt: skip


def route(logits_E: Any, S: int = 1, train: bool = True, **fields: Any) -> Routing:
    """One sequence of S tokens with exactly these logits: x = 1, w_router = the logits."""
    logits_E = jnp.asarray(logits_E, jnp.float32)
    config = SwitchConfig(**{"jitter": 0.0, **fields})
    router = param.bind(config.build(jax.random.key(0), 1, logits_E.size), {"w_router": logits_E[None]})
    return router(jnp.ones((1, S, 1)), context_for(1, S, train=train), jnp.zeros(logits_E.size))


def test_the_weight_is_the_probability_over_all_experts() -> None:
    found = route(np.log([1.0, 5.0, 2.0, 2.0]))
    np.testing.assert_array_equal(found.expert_BR, [[1]])
    np.testing.assert_allclose(found.weight_BR, [[0.5]], rtol=1e-6)
    np.testing.assert_allclose(found.probs_BSE[0, 0], [0.1, 0.5, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found.margin_BS, [[0.3]], rtol=1e-6)
    np.testing.assert_allclose(found.log_z_BS, [[np.log(10.0)]], rtol=1e-6)


def test_the_task_reaches_the_logits_though_one_expert_is_taken() -> None:
    gradient = jax.grad(lambda logits: route(logits).weight_BR.sum())(jnp.log(jnp.array([1.0, 5.0, 2.0, 2.0])))
    np.testing.assert_allclose(gradient, [-0.05, 0.25, -0.1, -0.1], rtol=1e-5)  # p_1 (delta - p)


def test_identical_experts_are_not_the_dense_layer_but_the_largest_probability_times_it() -> None:
    """What a layer made of copies of a dense one loses in scale under top-1."""
    router = SwitchConfig(jitter=0.0, init_std=0.2).build(jax.random.key(0), contract.D, 4)
    x = jax.random.normal(jax.random.key(1), (2, 6, contract.D))
    routing = router(x, context_for(2, 6), jnp.zeros(4))
    gate, up, down = (w[0] for w in contract.expert_weights(4))
    same = ExpertWeights(*(jnp.broadcast_to(w[:1], w.shape) for w in contract.expert_weights(4)))
    y, _ = DenseConfig().build()(x, routing, same)
    dense = (jax.nn.silu(x @ gate) * (x @ up)) @ down
    largest = routing.probs_BSE.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(y, largest * dense, rtol=1e-4, atol=1e-5)
    assert jnp.linalg.norm(y - dense) > 0.2 * jnp.linalg.norm(dense)


def test_initial_weights_are_cut_at_two_of_their_standard_deviations() -> None:
    std = np.sqrt(0.1 / 256)
    w = np.asarray(SwitchConfig().initial(jax.random.key(0), 256, 64))
    assert np.abs(w).max() <= 2 * std * (1 + 1e-6)
    np.testing.assert_allclose(w.std(), 0.8796 * std, rtol=0.02)  # of a normal cut at 2
    np.testing.assert_allclose(
        SwitchConfig(init_std=0.5).initial(jax.random.key(0), 256, 64), w * (0.5 / std), rtol=1e-5
    )


def test_jitter_moves_the_scores_in_training_only() -> None:
    still, moved = route([1.0, 2.0], S=32), route([1.0, 2.0], S=32, jitter=0.1)
    evaluated = route([1.0, 2.0], S=32, jitter=0.1, train=False)
    np.testing.assert_array_equal(evaluated.probs_BSE, still.probs_BSE)
    assert np.unique(np.asarray(moved.log_z_BS)).size == 32
    np.testing.assert_allclose(moved.log_z_BS, still.log_z_BS, rtol=0.11)


def test_priorities_are_random_in_training_equal_in_evaluation_and_absent_by_default() -> None:
    assert route([1.0, 2.0]).priority_BR is None
    trained = np.asarray(route([1.0, 2.0], S=64, random_token_selection=True).priority_BR)
    assert np.unique(trained).size == 64 and trained.min() >= 0 and trained.max() < 1
    np.testing.assert_allclose(trained.mean(), 0.5, atol=0.15)
    evaluated = route([1.0, 2.0], S=64, random_token_selection=True, train=False)
    assert not np.asarray(evaluated.priority_BR).any()


def test_random_token_selection_drops_as_many_tokens_but_not_always_the_last() -> None:
    """All 16 tokens want one of 4 experts, which has 8 places (factor 2)."""
    x, w = jnp.ones((1, 16, contract.D)), contract.expert_weights(4)
    dispatch = CapacityConfig(capacity_factor=2.0, keep="priority").build()

    def kept(train: bool) -> list[int]:
        routing = route([5.0, 0.0, 0.0, 0.0], S=16, train=train, random_token_selection=True)
        np.testing.assert_array_equal(np.bincount(routing.expert_BR[0], minlength=4), [16, 0, 0, 0])
        y, dropped = dispatch(x, routing, w)
        assert dropped.tolist() == [8]
        here = np.flatnonzero(np.abs(np.asarray(y[0])).max(axis=-1) > 0).tolist()
        if train:
            assert here == sorted(np.argsort(-np.asarray(routing.priority_BR[0]))[:8].tolist())
        return here

    assert kept(train=False) == list(range(8))
    assert kept(train=True) != list(range(8)) and max(kept(train=True)) >= 8


def test_a_buffer_by_priority_needs_a_router_that_gives_one() -> None:
    routing = dataclasses.replace(route([1.0, 0.0]), num_selected=1)
    with pytest.raises(ValueError, match="random_token_selection=True"):
        CapacityConfig(keep="priority").build()(jnp.ones((1, 1, contract.D)), routing, contract.expert_weights(2))


def test_values_that_cannot_work_are_refused() -> None:
    for fields, message in [({"jitter": 1.0}, "jitter = 1.0: must be less"), ({"jitter": -1}, "jitter = -1: must be")]:
        with pytest.raises(ConfigError, match=message):
            check(SwitchConfig(**fields))
