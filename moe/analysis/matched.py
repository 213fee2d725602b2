"""A metric of a run at an equal number of tokens or of training FLOPs, whatever its steps were.

A metric that is logged every step is the mean over the step's batch, so it is noisy: it is taken as constant over the
tokens of its step and averaged over the `WINDOW` before the point asked for. One that is measured now and then on
held-out text (`eval/...`) is interpolated between its measurements.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe.analysis.plots import Array

WINDOW = 0.05
"""Share of the whole range that a value is averaged over."""


class Track(NamedTuple):
    """A metric of one run over the tokens it was trained on, padding included."""

    tokens: Array
    values: Array
    measured: bool
    """Now and then on held-out text, not on every batch."""
    flops_per_token: int

    def over(self, flops: bool) -> Array:
        """The horizontal axis: tokens, or training FLOPs."""
        return self.tokens * self.flops_per_token if flops else self.tokens

    def at(self, points: Array, window: float, flops: bool) -> Array:
        """Values at points on that axis; nan beyond what the run has seen. `window` is in the units of the axis."""
        x = self.over(flops)
        if not x.size:
            return np.full(points.shape, np.nan)
        # A matched point is computed from the end of the shortest run; rounding must not put it beyond that end.
        inside = points <= x[-1] * (1 + 1e-9)
        if self.measured:
            found = np.interp(points, x, self.values)
            inside &= points >= x[0]
        else:
            knots = np.concatenate([[0.0], x])
            integral = np.concatenate([[0.0], np.cumsum(self.values * np.diff(knots))])
            first = np.maximum(points - window, 0.0)
            width = np.maximum(points - first, np.finfo(np.float64).tiny)
            found = (np.interp(points, knots, integral) - np.interp(first, knots, integral)) / width
        return np.where(inside, found, np.nan)


def track(records: Sequence[Mapping[str, Any]], metric: str, flops_per_token: int) -> Track:
    """A value a layer becomes the mean over layers; records without a finite value are left out."""
    found = [(record["tokens"], float(np.mean(record[metric]))) for record in records if metric in record]
    finite = [(tokens, value) for tokens, value in found if np.isfinite(value)]
    tokens, values = np.array(finite, np.float64).reshape(-1, 2).T
    return Track(tokens, values, metric.startswith("eval/"), flops_per_token)


def common_end(tracks: Sequence[Track], flops: bool) -> float:
    """Where the shortest of the runs ends; 0 if one has no value at all."""
    return min((float(x[-1]) if (x := one.over(flops)).size else 0.0 for one in tracks), default=0.0)
