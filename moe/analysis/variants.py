"""The finished runs of a sweep as variants: numbers over seeds, compared with a baseline, at the end and on the way."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe.analysis.matched import WINDOW, Track, common_end, track
from moe.analysis.run_files import ReportError
from moe.analysis.seeds import Difference, Estimate, estimate, holm, paired
from moe.analysis.sweep_runs import OneRun, Runs

SHARES = (0.25, 0.5, 1.0)
"""Of what the shortest run has seen: where variants are compared on the way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The finished runs of one config, by seed."""

    name: str
    runs: Mapping[int, OneRun]
    values: Mapping[int, float]
    """The metric at the end."""
    tracks: Mapping[int, Track]
    """The metric that is followed while training."""

    @property
    def estimate(self) -> Estimate:
        return estimate(list(self.values.values()))

    @property
    def note(self) -> str:
        return next(iter(self.runs.values())).note


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant against the baseline."""

    difference: Difference
    p_holm: float
    """p corrected for the number of comparisons with this baseline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The followed metric at equal tokens or at equal training FLOPs."""

    flops: bool
    end: float
    """Where the shortest of all runs ends."""

    @property
    def unit(self) -> str:
        return "training FLOPs" if self.flops else "training tokens"

    @property
    def points(self) -> list[float]:
        return [share * self.end for share in SHARES]

    def at(self, variant: Variant, point: float) -> dict[int, float]:
        """By seed."""
        where = np.array([point])
        return {seed: float(one.at(where, WINDOW * self.end, self.flops)[0]) for seed, one in variant.tracks.items()}


def find_variants(runs: Runs, metric: str, curve: str) -> list[Variant]:
    """Lowest mean first; one without a number is last. ReportError for a metric that no run has."""
    found = []
    for name, group in runs.finished.items():
        by_seed = {run.seed: run for run in group}
        values = {seed: run.value(metric) for seed, run in by_seed.items()}
        tracks = {seed: track(run.records, curve, run.flops_per_token) for seed, run in by_seed.items()}
        found.append(Variant(name=name, runs=by_seed, values=values, tracks=tracks))
    if found and all(metric not in {*run.summary, *run.records[-1]} for one in found for run in one.runs.values()):
        raise ReportError(f"metric = {metric!r}: is neither in the summary nor in the last metrics of any finished run")
    return sorted(found, key=lambda one: (math.isnan(one.estimate.mean), one.estimate.mean, one.name))


def compare(
    variants: Sequence[Variant], baseline: str | None, values: Mapping[str, Mapping[int, float]]
) -> dict[str, Comparison]:
    """Every other variant with the baseline, by `values` of variant and seed; empty without a baseline."""
    if baseline is None or baseline not in values:
        return {}
    names = [one.name for one in variants if one.name != baseline]
    differences = [paired(values[name], values[baseline]) for name in names]
    corrected = holm([one.p for one in differences])
    return {
        name: Comparison(difference=difference, p_holm=p)
        for name, difference, p in zip(names, differences, corrected, strict=True)
    }


def views(variants: Sequence[Variant]) -> tuple[View, View]:
    """At equal tokens, and at equal training FLOPs."""
    tracks = [one for variant in variants for one in variant.tracks.values()]
    tokens, flops = (View(flops=flops, end=common_end(tracks, flops)) for flops in (False, True))
    return tokens, flops
