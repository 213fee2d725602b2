"""Random routing: uniform, another draw for every token, step and key, also in evaluation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.base import RouterConfig, Routing
from moe.routing.random_choice import RandomConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [RandomConfig(), RandomConfig(num_selected=3)]
B, S, E = 8, 100, 8


def route(key: int = 0, train: bool = True, **fields: Any) -> Routing:
    context = dataclasses.replace(context_for(B, S, train=train), key=jax.random.key(key))
    return RandomConfig(**fields).build(jax.random.key(0), 4, E)(jnp.ones((B, S, 4)), context, jnp.zeros(E))


def test_every_expert_is_as_likely_as_any_other() -> None:
    for K in (1, 3):
        counts, mean = np.bincount(np.asarray(route(num_selected=K).expert_BR).ravel(), minlength=E), B * S * K / E
        assert np.abs(counts - mean).max() < 4.5 * np.sqrt(mean), counts


def test_tokens_draw_independently_and_again_at_every_key() -> None:
    a, b = (np.asarray(route(key).expert_BR) for key in (0, 1))
    assert abs((a == b).mean() - 1 / E) < 0.05
    assert abs((a[0] == a[1]).mean() - 1 / E) < 0.15 and abs((a[:, 1:] == a[:, :-1]).mean() - 1 / E) < 0.05


def test_evaluation_draws_too_and_the_same_key_draws_the_same() -> None:
    np.testing.assert_array_equal(route(train=False).expert_BR, route(train=True).expert_BR)


def test_weights_and_probabilities_are_uniform_and_there_is_nothing_to_learn() -> None:
    found = route(num_selected=4)
    assert (np.asarray(found.weight_BR) == 0.25).all() and (np.asarray(found.probs_BSE) == 1 / E).all()
    assert not jax.tree.leaves(param.pure(RandomConfig().build(jax.random.key(0), 4, E)))


def test_values_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_selected = 0: must be at least 1"):
        check(RandomConfig(num_selected=0))
    assert "num_selected" in dict(RandomConfig(num_selected=9).layer_problems(8))
