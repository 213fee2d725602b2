"""Forced balance: the load is exactly even, whatever the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.base import RouterConfig
from moe.routing.round_robin import RoundRobinConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [RoundRobinConfig(), RoundRobinConfig(num_selected=3)]
E = 8


def counts(B: int, S: int, K: int, padding: int = 0, first: int = 0) -> np.ndarray:
    """[B, E] assignments."""
    router = RoundRobinConfig(num_selected=K).build(jax.random.key(0), 4, E)
    found = router(jnp.ones((B, S, 4)), context_for(B, S, padding=padding, first=first), jnp.zeros(E))
    return np.stack([np.bincount(row, minlength=E + 1)[:E] for row in np.asarray(found.expert_BR)])


def test_the_first_tokens_take_their_turns() -> None:
    router = RoundRobinConfig(num_selected=2).build(jax.random.key(0), 4, E)
    found = router(jnp.ones((2, 5, 4)), context_for(2, 5, first=1), jnp.zeros(E))
    np.testing.assert_array_equal(found.expert_BR, [[2, 3, 4, 5, 6, 7, 0, 1, 2, 3], [4, 5, 6, 7, 0, 1, 2, 3, 4, 5]])
    assert (np.asarray(found.weight_BR) == 0.5).all()


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_every_sequence_is_exactly_even_where_the_experts_divide_its_assignments(K: int) -> None:
    assert (counts(3, 16, K) == 2 * K).all()
    assert (counts(3, 19, K, padding=3) == 2 * K).all(), "padding takes no turn"


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_batch_is_exactly_even_where_sequences_are_too_short(K: int) -> None:
    for first in (0, 5):
        found = counts(8, 5, K, first=first)
        assert found.max() - found.min() <= 1
        assert (found.sum(axis=0) == 5 * K).all()


def test_padding_in_the_middle_takes_no_turn() -> None:
    context = context_for(1, 12)
    holes = dataclasses.replace(context, segment_BS=context.segment_BS.at[0, 2:6].set(0))
    found = RoundRobinConfig(num_selected=1).build(jax.random.key(0), 4, E)(jnp.ones((1, 12, 4)), holes, jnp.zeros(E))
    np.testing.assert_array_equal(found.expert_BR, [[0, 1, E, E, E, E, 2, 3, 4, 5, 6, 7]])


def test_there_is_nothing_to_learn_and_impossible_values_are_refused() -> None:
    assert not jax.tree.leaves(param.pure(RoundRobinConfig().build(jax.random.key(0), 4, E)))
    with pytest.raises(ConfigError, match="num_selected = 0: must be at least 1"):
        check(RoundRobinConfig(num_selected=0))
    assert "num_selected" in dict(RoundRobinConfig(num_selected=9).layer_problems(8))
