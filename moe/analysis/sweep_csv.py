"""The numbers of a sweep's report for a spreadsheet: `runs.csv`, a line a run, and `variants.csv`, a line a variant."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.analysis.seeds import estimate
from moe.analysis.sweep_runs import OneRun, Runs
from moe.analysis.variants import Comparison, Variant, View, compare


def write_csv(
    folder: Path, runs: Runs, variants: Sequence[Variant], baseline: str | None, both: Sequence[View], metric: str,
    curve: str, end: Mapping[str, Comparison],
) -> None:  # fmt: skip
    """Both files; an empty cell where there is no number."""
    by_name = {one.name: one for one in variants}
    order = sorted(runs.runs, key=lambda run: (run.name not in by_name, run.name, run.seed, str(run.folder)))
    _write(folder / "runs.csv", [_run(run, metric) for run in order])
    on_the_way = [
        (view, compare(variants, baseline, {one.name: view.at(one, view.end) for one in variants})) for view in both
    ]
    _write(folder / "variants.csv", [_variant(one, metric, curve, end, on_the_way) for one in variants])


def _run(run: OneRun, metric: str) -> dict[str, Any]:
    row = {"variant": run.name, "seed": run.seed, "state": run.state, "step": run.step, "steps": run.steps}
    more = {
        metric: run.value(metric) if run.finished else math.nan,
        "tokens": run.tokens,
        "training_flops": run.tokens * run.flops_per_token,
        "load/max_violation": run.tail("load/max_violation"),
        "load/dead": run.tail("load/dead", total=True),
        "load/dropped": run.tail("load/dropped"),
        "parameters/active": run.value("parameters/active"),
        "parameters/total": run.value("parameters/total"),
        "time/step_s": run.step_s,
    }
    return row | more


def _variant(
    one: Variant, metric: str, curve: str, end: Mapping[str, Comparison],
    on_the_way: Sequence[tuple[View, Mapping[str, Comparison]]],
) -> dict[str, Any]:  # fmt: skip
    found = one.estimate
    row: dict[str, Any] = {"variant": one.name, "seeds": found.n, f"{metric}/mean": found.mean}
    row |= {f"{metric}/sd": found.std, f"{metric}/low": found.low, f"{metric}/high": found.high}
    row |= _difference(metric, end.get(one.name))
    for view, comparisons in on_the_way:
        key = f"{curve}/at_equal_{'flops' if view.flops else 'tokens'}"
        row[f"{key}/at"] = view.end
        row[f"{key}/mean"] = estimate(list(view.at(one, view.end).values())).mean
        row |= _difference(key, comparisons.get(one.name))
    return row | {"what": one.note}


def _difference(key: str, comparison: Comparison | None) -> dict[str, Any]:
    names = ("difference", "difference_low", "difference_high", "p", "p_holm", "common_seeds")
    values: tuple[float, ...] = (math.nan,) * len(names)
    if comparison is not None:
        found = comparison.difference.estimate
        values = (found.mean, found.low, found.high, comparison.difference.p, comparison.p_holm, found.n)
    return {f"{key}/{name}": value for name, value in zip(names, values, strict=True)}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["variant"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if value != value else value for key, value in row.items()})
    partial.replace(path)
