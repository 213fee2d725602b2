"""What several seeds say of a number: mean, spread, t intervals, and comparisons paired by seed.

    mean ± t_{n-1} s / sqrt(n)       s: standard deviation with n - 1 in the denominator, t: the 97.5 % quantile

of the values for one variant, of the differences seed by seed for two. A seed fixes the initial parameters and the
order of the data, so pairing takes out what both share. One seed has no interval and no p; two have one that is 12.7
standard errors wide, which is what two seeds are worth.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """Of a mean; nan where so few values do not say."""

    n: int
    mean: float
    std: float
    half: float
    """Half the width of the confidence interval."""

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


class Difference(NamedTuple):
    """A variant minus the baseline, over the seeds that both have."""

    estimate: Estimate
    p: float
    """Of a two-sided paired t test; nan below two seeds, or where all differences are the same."""


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean, standard deviation and t interval of independent values."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Estimate(n, mean, math.nan, math.nan)
    std = float(np.std(values, ddof=1))
    return Estimate(n, mean, std, t_quantile(0.5 + confidence / 2, n - 1) * std / math.sqrt(n))


def paired(variant: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """`variant` - `baseline`, both from seed to value."""
    common = sorted(variant.keys() & baseline.keys())
    found = estimate([variant[seed] - baseline[seed] for seed in common])
    if found.n < 2 or not found.std > 0:
        return Difference(found, math.nan)
    t = found.mean / (found.std / math.sqrt(found.n))
    return Difference(found, 2 * float(special.stdtr(found.n - 1, -abs(t))))


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution with `freedom` degrees of freedom."""
    return float(special.stdtrit(freedom, probability))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values after Holm's correction for their number; nan stays nan and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    found, least = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[index] = least
    return found
