"""The shuffled control: samples without replacement of the whole batch, the same under every cut, right on average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import LoadBalanceConfig, ShuffledLoadBalanceConfig, Statistics
from moe.config import ConfigError, check
from tests.balance.examples import cut, logits_and_mask, sums, whole_term

G, S, E, K = 8, 6, 6, 2


def marked() -> tuple[Statistics, np.ndarray]:
    """Every real token takes an expert of its own, so a sample's load names its tokens."""
    _, mask = logits_and_mask(G, S, E)
    wide = G * S
    logits = jnp.where(jnp.arange(wide) == jnp.arange(wide).reshape(G, S, 1), 50.0, 0.0)
    return sums(logits, mask, K=1), mask


@pytest.mark.parametrize("n", [1, 2, 8])
def test_every_group_draws_as_many_tokens_as_it_has_and_none_twice(n: int) -> None:
    stats, mask = marked()
    rule = ShuffledLoadBalanceConfig(sequences=n)
    load_GE = np.asarray(rule.sampled_load(cut(stats, 1), jax.random.key(0))[0])[::n]
    tokens_G = mask.reshape(-1, n * S).sum(axis=1)
    drawn = [np.flatnonzero(row) for row in load_GE]
    assert [len(tokens) for tokens in drawn] == tokens_G.tolist()
    for row, count in zip(load_GE, tokens_G, strict=True):
        np.testing.assert_allclose(row[row > 0], 1 / count if count else 1.0, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)), np.flatnonzero(mask.reshape(-1)))


def test_a_token_brings_all_its_assignments() -> None:
    """Experts 2i and 2i + 1 are always taken together."""
    _, mask = logits_and_mask(G, S, E)
    pair = np.random.default_rng(0).integers(0, 3, (G, S))
    logits = np.where(np.arange(E) // 2 == pair[..., None], 9.0 + np.arange(E) % 2, 0.0)
    stats = sums(jnp.asarray(logits, jnp.float32), mask)
    load = np.asarray(ShuffledLoadBalanceConfig().sampled_load(cut(stats, 2), jax.random.key(1))[0])
    np.testing.assert_array_equal(load[:, ::2], load[:, 1::2])


def loads(n: int, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sampled load [draws, G, E], load of every group, load of the batch)."""
    logits, mask = logits_and_mask(G, S, E)
    stats = sums(logits, mask)
    rule = ShuffledLoadBalanceConfig(sequences=n)
    keys = jax.random.split(jax.random.key(2), draws)
    found = jax.jit(jax.vmap(lambda key: rule.sampled_load(cut(stats, 1), key)[0]))(keys)
    count = np.asarray(stats.count_BE[0], float)
    return np.asarray(found), count, count.sum(axis=0) / count.sum()


def test_on_average_the_sampled_load_is_that_of_the_batch() -> None:
    found, count_GE, f = loads(1, 400)
    real = count_GE.sum(axis=1) > 0
    mean = found.mean(axis=0)[real]
    error = found.std(axis=0)[real] / np.sqrt(400)
    assert (np.abs(mean - f) < 4.5 * error + 1e-6).all()
    assert error.max() < 0.02
    # The load of a sequence is much further away than that of a sample of the same size.
    own = count_GE[real] / count_GE[real].sum(axis=1, keepdims=True)
    assert np.abs(own - f).sum(axis=1).mean() > 1.5 * np.abs(found[:, real] - f).sum(axis=-1).mean()


def test_one_group_that_is_the_whole_batch_draws_all_of_it() -> None:
    logits, mask = logits_and_mask(G, S, E)
    stats = sums(logits, mask)
    for A in (1, 2):
        found = whole_term(ShuffledLoadBalanceConfig(sequences=G), stats, A)[0]
        np.testing.assert_allclose(found, whole_term(LoadBalanceConfig(), stats, A)[0], rtol=1e-6)


def test_layers_and_steps_draw_for_themselves_and_the_same_step_draws_the_same() -> None:
    logits, mask = logits_and_mask(G, S, E)
    one = sums(logits, mask)
    two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)
    rule = ShuffledLoadBalanceConfig()
    first, second = whole_term(rule, two, step=3)[0]
    assert first != second
    assert whole_term(rule, two, step=4)[0][0] != first
    np.testing.assert_array_equal(whole_term(rule, two, step=3)[0], [first, second])


def test_without_the_assignments_it_raises_and_bad_sizes_are_refused() -> None:
    logits, mask = logits_and_mask(G, S, E)
    stats = dataclasses.replace(sums(logits, mask), expert_BR=None)
    with pytest.raises(ValueError, match="'shuffled' needs the assignments of single tokens"):
        whole_term(ShuffledLoadBalanceConfig(), stats)
    with pytest.raises(ConfigError, match="sequences = 0: must be at least 1"):
        check(ShuffledLoadBalanceConfig(sequences=0))
    assert next(ShuffledLoadBalanceConfig(sequences=3).batch_problems(2, 4))[0] == "sequences"
