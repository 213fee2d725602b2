"""Small loads whose numbers can be worked out by hand."""

import numpy as np
import pytest

from moe.analysis.specialisation import (
    chain,
    conditional,
    dead_experts,
    domain_distance,
    hot_experts,
    hot_overlap,
    max_violation,
    normalised_entropy,
    pair_lift,
    pooled_load,
    top_experts,
)

EVEN = [0.25, 0.25, 0.25, 0.25]
HALF = [0.5, 0.5, 0.0, 0.0]
ONE = [0.0, 0.0, 0.0, 1.0]


def test_max_violation() -> None:
    # 4 * 0.25 - 1, 4 * 0.5 - 1, 4 * 1 - 1
    np.testing.assert_allclose(max_violation([EVEN, HALF, ONE]), [0.0, 1.0, 3.0])


def test_normalised_entropy() -> None:
    # ln 4 / ln 4, ln 2 / ln 4, 0
    np.testing.assert_allclose(normalised_entropy([EVEN, HALF, ONE]), [1.0, 0.5, 0.0])
    assert np.signbit(normalised_entropy([ONE])[0]) == np.False_  # 0, not -0, in a table
    np.testing.assert_array_equal(normalised_entropy([[1.0]]), [1.0])


def test_dead_experts_are_below_one_percent_of_the_even_share() -> None:
    np.testing.assert_array_equal(dead_experts([EVEN, HALF, ONE]), [0, 2, 3])
    # The line for E = 4 is 0.0025: just above it an expert lives, just below it is dead.
    rest = (1 - 0.0026 - 0.0024) / 2
    np.testing.assert_array_equal(dead_experts([[0.0026, 0.0024, rest, rest]]), [1])


def test_domain_distance() -> None:
    # Layer 0: alike. Layer 1: no expert in common. Layer 2: 1/2 (1/4 + 1/4 + 1/4 + 1/4) = 1/2.
    pair = {"a": [EVEN, HALF, EVEN], "b": [EVEN, [0.0, 0.0, 0.5, 0.5], HALF]}
    np.testing.assert_allclose(domain_distance(pair), [0.0, 1.0, 0.5])


def test_domain_distance_is_the_mean_over_pairs() -> None:
    # even-half 1/2, even-one 3/4, half-one 1
    np.testing.assert_allclose(domain_distance({"a": [EVEN], "b": [HALF], "c": [ONE]}), [(0.5 + 0.75 + 1.0) / 3])


def test_domain_distance_of_samples_of_one_load_is_the_noise_the_docstring_says() -> None:
    experts, assignments = 64, 4096
    counts = np.random.default_rng(0).multinomial(assignments, np.full(experts, 1 / experts), size=20)
    found = domain_distance({str(i): [row / assignments] for i, row in enumerate(counts)})
    np.testing.assert_allclose(found, np.sqrt(experts / (np.pi * assignments)), rtol=0.05)


def test_pooled_load_is_weighted_by_tokens() -> None:
    # (3 * [1/2, 1/2, 0, 0] + 1 * [0, 0, 0, 1]) / 4
    pooled = pooled_load({"a": [HALF], "b": [ONE]}, {"b": 1.0, "a": 3.0})
    np.testing.assert_allclose(pooled, [[0.375, 0.375, 0.0, 0.25]])


def test_top_experts_are_sorted_and_ties_go_by_index() -> None:
    found = top_experts([[0.1, 0.4, 0.1, 0.4], ONE], 3)
    np.testing.assert_array_equal(found, [[1, 3, 0], [3, 0, 1]])
    assert top_experts([EVEN], 9).shape == (1, 4)


@pytest.mark.parametrize("load", [[0.5, 0.5], [[0.5, 0.4]], [[1.5, -0.5]], [[np.nan, 1.0]], [[]], np.zeros((2, 4))])
def test_what_is_not_a_load_is_refused(load) -> None:
    with pytest.raises(ValueError, match="load"):
        max_violation(load)


def test_domains_must_be_two_and_of_one_shape() -> None:
    with pytest.raises(ValueError, match="has 1 domains"):
        domain_distance({"a": [EVEN]})
    with pytest.raises(ValueError, match="differ in shape"):
        domain_distance({"a": [EVEN], "b": [EVEN, EVEN]})


def test_busy_experts_take_twice_their_share_in_layers_of_any_width() -> None:
    load_DL = {"a": [HALF, [0.9, 0.1]], "b": [ONE, [0.5, 0.5]], "c": [[0.5, 0.1, 0.4, 0.0], [1.0, 0.0]]}
    hot = hot_experts(load_DL)  # type: ignore[arg-type]
    assert hot == {"a": {(0, 0), (0, 1)}, "b": {(0, 3)}, "c": {(0, 0), (1, 0)}}
    overlap = hot_overlap(hot)
    np.testing.assert_allclose(overlap, [[1, 0, 1 / 3], [0, 1, 0], [1 / 3, 0, 1]])
    assert np.isnan(hot_overlap({"a": set(), "b": set()})).all()


def test_lift_is_one_where_pairs_come_as_their_loads_say() -> None:
    # Each of the 6 pairs of 4 experts 20 times: 120 tokens, 60 an expert; n_e n_f / T would be 30, not 20.
    even = np.full((4, 4), 20) + np.eye(4, dtype=int) * 40
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(pair_lift(even)[off], 1.0)
    assert np.isnan(np.diag(pair_lift(even))).all()
    np.testing.assert_allclose(conditional(even)[off], 1 / 3)


def test_lift_of_companions_and_strangers_by_hand() -> None:
    # 0 and 1 always together 90 times, 2 and 3 90 times: 90 tokens an expert; 360 ordered pairs over 12 equal chances.
    pairs = np.array([[90, 90, 0, 0], [90, 90, 0, 0], [0, 0, 90, 90], [0, 0, 90, 90]])
    lift = pair_lift(pairs)
    assert lift[0, 1] == lift[2, 3] == 3.0 and lift[0, 2] == 0.0
    assert np.isnan(pair_lift(pairs // 10)).all()  # 3 tokens a pair expected: too few
    assert conditional(pairs)[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    order = chain(lift[np.ix_([0, 2, 1, 3], [0, 2, 1, 3])])
    assert sorted(order) == [0, 1, 2, 3] and {frozenset(order[:2]), frozenset(order[2:])} == {
        frozenset((0, 2)), frozenset((1, 3)),
    }  # fmt: skip


def test_one_expert_a_token_has_no_lift() -> None:
    assert np.isnan(pair_lift(np.diag([50, 60, 70]))).all()
