"""Quantile balancing: the histogram against a loop, the bias against an exact quantile, and what it does to a load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance import QuantileConfig, load
from moe.balance.shortfall import count_below, edges
from moe.balance.statistics import statistics
from moe.config import ConfigError, check
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.routing.topk import TopKConfig
from moe.train.run import RunConfig
from tests.balance.examples import cut, exists, logits_and_mask, route, sums

FINE = (1.0, 4001)


def shortfalls(logits: np.ndarray, mask: np.ndarray, K: int, bias: np.ndarray) -> np.ndarray:
    """[T, E] the best score left out minus the score, of real tokens, in a loop."""
    found = []
    for g, s in zip(*np.nonzero(mask), strict=True):
        z = np.exp(logits[g, s] - logits[g, s].max())
        score = z / z.sum() + bias
        found.append(np.sort(score)[::-1][K] - score)
    return np.array(found)


def test_a_router_without_selection_scores_is_refused_before_anything_runs() -> None:
    grouped = TopKConfig(num_groups=4, num_groups_selected=2)
    run = RunConfig(model=DecoderConfig(moe=MoEConfig(router=grouped)), balance=(QuantileConfig(),))
    with pytest.raises(ConfigError, match=r"^balance\.0\.name = 'quantile': reads selection scores, which TopKConfig"):
        check(run)


@pytest.mark.parametrize("K", [1, 2])
def test_the_histogram_counts_the_tokens_that_lack_less_than_each_edge(K: int) -> None:
    logits, mask = logits_and_mask(G=16, S=12)
    bias = np.random.default_rng(0).normal(0, 0.1, 6)
    found = np.asarray(sums(logits, mask, K, jnp.asarray(bias, jnp.float32), shortfall=(0.5, 21)).below_EH[0])
    missing = shortfalls(np.asarray(logits, float), mask, K, bias)
    expected = (missing[..., None] < edges(0.5, 21)).sum(axis=0)
    np.testing.assert_array_equal(found, expected)
    at_zero = edges(0.5, 21)[10:12]
    assert at_zero[0] < 0 < at_zero[1]  # 0 is inside of a bin: the runner-up lacks nothing, up to rounding


def test_the_move_is_the_quantile_of_what_is_lacking() -> None:
    logits, mask = logits_and_mask(G=16, S=12)
    stats = sums(logits, mask, 2, shortfall=FINE)
    rule = QuantileConfig(bins=FINE[1])
    found = np.asarray(rule.update(rule.init_state(exists(stats)), cut(stats, 4))["bias"][0])
    missing = np.sort(shortfalls(np.asarray(logits, float), mask, 2, np.zeros(6)), axis=0)
    share = len(missing) * 2 / 6
    exact = missing[int(np.ceil(share)) - 1]
    np.testing.assert_allclose(found, exact - exact.mean(), atol=2 * FINE[0] / FINE[1] + 1e-6)
    assert np.abs(exact).max() > 0.05


def test_by_hand_two_experts_of_which_one_takes_all() -> None:
    """Scores 0.6 and 0.4 for half of the tokens, 0.8 and 0.2 for the others: the bias moves the first half over."""
    score = np.array([[0.6, 0.4]] * 5 + [[0.8, 0.2]] * 5)
    logits, mask = jnp.log(jnp.asarray(score, jnp.float32))[None], np.ones((1, 10), bool)
    rule = QuantileConfig(bins=1001)
    stats = sums(logits, mask, K=1, shortfall=(1.0, 1001))
    bias = np.asarray(rule.update({"bias": jnp.zeros((1, 2))}, cut(stats, 1))["bias"][0])
    # Expert 0 lacks -0.2 or -0.6: half of the tokens lie below a bias move between; expert 1 lacks 0 everywhere.
    assert 0.2 < bias[1] - bias[0] < 0.65 and abs(bias.sum()) < 1e-6
    taken = np.asarray(route(logits, mask, 1, jnp.asarray(bias)).expert_BR).reshape(-1)
    assert np.bincount(taken, minlength=2).tolist() == [5, 5]


def test_a_few_updates_balance_a_skewed_batch_where_the_sign_rule_would_crawl() -> None:
    rng = np.random.default_rng(3)
    mask = np.ones((16, 32), bool)
    logits = jnp.asarray(rng.normal(0, 1, (16, 32, 6)) + np.array([2.0, 1.0, 0, 0, -1.0, -2.0]), jnp.float32)
    rule = QuantileConfig(bins=1001)
    state = {"bias": jnp.zeros((1, 6))}
    violation = []
    for _ in range(6):
        stats = sums(logits, mask, 2, state["bias"][0], shortfall=(1.0, 1001))
        violation.append(6 * float(load(stats.count_BE[0].sum(axis=0)).max()) - 1)
        state = rule.update(state, cut(stats, 2))
    assert violation[0] > 1.0 and violation[-1] < 0.1


def test_a_balanced_batch_is_left_as_it_is() -> None:
    """Every expert is taken, and is the runner-up, equally often: the quantile is where nothing is lacking."""
    E = 6
    ring = np.array([[3.0 if i == t else 2.0 if i == (t + 1) % E else 0.0 for i in range(E)] for t in range(E)])
    stats = sums(jnp.asarray(ring, jnp.float32)[None], np.ones((1, E), bool), K=1, shortfall=(1.0, 1001))
    bias = QuantileConfig(bins=1001).update({"bias": jnp.zeros((1, E))}, cut(stats, 1))["bias"]
    np.testing.assert_allclose(bias, 0, atol=1e-6)


def test_memory_keeps_its_share_of_the_old_bias() -> None:
    logits, mask = logits_and_mask()
    old = jnp.asarray([[0.1, -0.1, 0.2, -0.2, 0.05, -0.05]])
    stats = sums(logits, mask, 2, old[0])
    now, half = (QuantileConfig(bins=101, memory=m).update({"bias": old}, cut(stats, 2))["bias"] for m in (0.0, 0.5))
    np.testing.assert_allclose(half, 0.5 * old + 0.5 * now, atol=1e-6)


def test_moves_stop_at_the_reach() -> None:
    logits = jnp.where(jnp.arange(4) == 0, 50.0, 0.0) * jnp.ones((2, 3, 4))
    stats = sums(logits, np.ones((2, 3), bool), K=1, shortfall=(0.25, 11))
    rule = QuantileConfig(reach=0.25, bins=11)
    bias = np.asarray(rule.update(rule.init_state(exists(stats)), cut(stats, 1))["bias"][0])
    assert bias.min() >= -0.5 and bias.max() <= 0.5 and bias[0] < bias[1:].min() - 0.2


def test_a_router_that_selects_by_no_score_raises_and_bad_knobs_are_refused() -> None:
    logits, mask = logits_and_mask()
    routing = dataclasses.replace(route(logits, mask), select_BSE=None)
    with pytest.raises(ValueError, match="needs a router whose tokens take the experts of the best scores"):
        statistics(routing, jnp.asarray(mask), jnp.zeros(8, jnp.int32), shortfall=(1.0, 11))
    stats = sums(logits, mask, shortfall=None)
    with pytest.raises(ValueError, match="'quantile': a layer with experts counts no missing scores"):
        QuantileConfig().update({"bias": jnp.zeros((1, 6))}, jax.tree.map(lambda leaf: leaf[None], stats))
    for fields, message in (
        ({"bins": 10}, "bins = 10: must be odd"),
        ({"memory": 1.0}, "memory = 1.0: must be at least 0 and less than 1"),
        ({"reach": 0.0}, "reach = 0.0: must be greater than 0"),
        ({"coefficient": 0.1}, "coefficient = 0.1: must be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(QuantileConfig(**fields))


def test_the_last_expert_taken_lacks_less_than_nothing_and_padding_is_not_counted() -> None:
    logits, mask = logits_and_mask()
    below = np.asarray(count_below(route(logits, mask), jnp.asarray(mask), 1.0, 101))
    assert below[:, -1].max() == mask.sum()
    count = np.asarray(sums(logits, mask).count_BE[0].sum(axis=0))
    assert (below[:, 50] <= count).all() and (below[:, 51] >= count).all()  # the bin that holds 0
