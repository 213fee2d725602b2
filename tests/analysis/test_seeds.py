"""Statistics over seeds against values derived by hand or taken from printed tables of Student's t."""

import math

import pytest

from moe.analysis.seeds import estimate, holm, paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_quantiles_are_those_of_the_printed_table(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-4)


def test_one_degree_of_freedom_is_the_cauchy_distribution() -> None:
    """Its quantile is tan(pi (q - 1/2))."""
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)


def test_three_values_by_hand() -> None:
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, variance 14 / 2 = 7; half = 4.303 sqrt(7 / 3)."""
    found = estimate([1.0, 2.0, 6.0])
    assert (found.n, found.mean) == (3, 3.0)
    assert found.std == pytest.approx(math.sqrt(7))
    assert found.half == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    one, none = estimate([2.5]), estimate([])
    assert one.mean == 2.5 and math.isnan(one.std) and math.isnan(one.half)
    assert none.n == 0 and math.isnan(none.mean)


def test_pairs_are_by_seed_and_only_common_seeds_count() -> None:
    """Differences 0.5, 0.1, 0.3 of seeds 0, 1, 2: mean 0.3, s 0.2, t = 0.3 / (0.2 / sqrt 3) = 2.598.

    With 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(6.75 / 8.75).
    """
    found = paired({0: 2.5, 1: 1.1, 2: 7.3, 9: 100.0}, {2: 7.0, 1: 1.0, 0: 2.0, 8: -100.0})
    assert found.estimate.n == 3 and found.estimate.mean == pytest.approx(0.3)
    assert found.estimate.half == pytest.approx(4.30265 * 0.2 / math.sqrt(3), rel=1e-5)
    assert found.p == pytest.approx(1 - math.sqrt(6.75 / 8.75), rel=1e-9)


def test_two_seeds_by_hand() -> None:
    """Differences 1 and 3: mean 2, s sqrt 2, t = 2; Cauchy: p = 1 - (2 / pi) atan 2."""
    found = paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2), rel=1e-9)
    assert found.estimate.half == pytest.approx(12.7062, rel=1e-5)


def test_what_has_no_p_says_so() -> None:
    assert math.isnan(paired({0: 1.0}, {0: 0.5}).p)
    assert math.isnan(paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}).p)
    apart = paired({0: 1.0}, {1: 1.0})
    assert apart.estimate.n == 0 and math.isnan(apart.p)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1 is 0.03, 0.04, 0.04; never below the one before, never above 1."""
    assert holm([0.04, 0.01, math.nan, 0.02]) == pytest.approx([0.04, 0.03, math.nan, 0.04], nan_ok=True)
    assert holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
