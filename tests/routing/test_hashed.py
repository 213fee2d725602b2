"""Hash routing: fixed by token id and seed, distinct, even over many ids."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.base import Context, RouterConfig, Routing
from moe.routing.hashed import HashConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [HashConfig(), HashConfig(num_selected=3, seed=7)]
E = 8


def context(tokens: Any) -> Context:
    return dataclasses.replace(context_for(*np.shape(tokens)), token_BS=jnp.asarray(tokens, jnp.int32))


def route(tokens: Any, seed_of_build: int = 0, **fields: Any) -> Routing:
    router = HashConfig(**fields).build(jax.random.key(seed_of_build), 4, E)
    return router(jnp.ones((*np.shape(tokens), 4)), context(tokens), jnp.zeros(E))


def experts(tokens: Any, **fields: Any) -> np.ndarray:
    found = route(tokens, **fields)
    return np.asarray(found.expert_BR).reshape(*np.shape(tokens), -1)


def test_a_token_id_has_its_experts_wherever_it_stands() -> None:
    found = experts([[3, 500, 3, 9], [9, 3, 77, 500]], num_selected=2)
    for a, b in [((0, 0), (0, 2)), ((0, 0), (1, 1)), ((0, 1), (1, 3)), ((0, 3), (1, 0))]:
        np.testing.assert_array_equal(found[a], found[b])


def test_the_hash_is_fixed_for_ever_by_its_seed() -> None:
    """Checkpoints are trained on it: these values must not change with a version or a machine."""
    assert experts([[0, 1, 2, 3, 50256]], num_selected=1)[0, :, 0].tolist() == GOLDEN
    np.testing.assert_array_equal(experts([[5, 6]], seed_of_build=1), experts([[5, 6]], seed_of_build=2))
    ids = [list(range(200))]
    assert (experts(ids, seed=1) == experts(ids, seed=2)).mean() < 0.3


def slow_hash(x: int) -> int:
    x = (x + 0x9E3779B9) % 2**32
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 16)) * factor % 2**32
    return x ^ (x >> 16)


def slow_expert(token: int, seed: int = 0) -> int:
    of_token = slow_hash(token ^ slow_hash(seed))
    return int(np.argmax([slow_hash((of_token + slow_hash(e)) % 2**32) for e in range(1, E + 1)]))


GOLDEN = [slow_expert(token) for token in (0, 1, 2, 3, 50256)]


def test_experts_are_distinct_and_fewer_are_the_first_of_more() -> None:
    ids = [list(range(300))]
    all_of_them = experts(ids, num_selected=E)
    assert (np.sort(all_of_them, axis=-1) == np.arange(E)).all()
    np.testing.assert_array_equal(experts(ids, num_selected=3), all_of_them[..., :3])


def test_ids_spread_evenly_over_experts_and_seeds_are_independent() -> None:
    ids = [list(range(8000))]
    first = experts(ids)[0, :, 0]
    counts = np.bincount(first, minlength=E)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 7 / 8), counts
    pairs = np.bincount(first * E + experts(ids, seed=1)[0, :, 0], minlength=E * E)
    assert np.abs(pairs - 125).max() < 5 * np.sqrt(125), pairs


def test_weights_are_equal_and_there_is_nothing_to_learn() -> None:
    found = route([[4, 5]], num_selected=4)
    np.testing.assert_array_equal(found.weight_BR, np.full((1, 8), 0.25))
    np.testing.assert_array_equal(np.sort(found.probs_BSE, axis=-1)[0], [[0] * 4 + [0.25] * 4] * 2)
    assert not jax.tree.leaves(param.pure(HashConfig().build(jax.random.key(0), 4, E)))


def test_values_that_cannot_work_are_refused() -> None:
    for fields, message in [
        ({"num_selected": 0}, "num_selected = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"seed": 2**32}, r"seed = 4294967296: must be below 2\^32"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check(HashConfig(**fields))
    assert "num_selected" in dict(HashConfig(num_selected=9).layer_problems(8))
