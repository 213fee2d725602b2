"""The report over several runs: a page, `runs.csv`, `variants.csv`, `curves.png` and `final.png`.

Every number comes from the runs' own files. The same runs give the same bytes, but for what is a time.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe.analysis.markdown import table
from moe.analysis.matched import WINDOW
from moe.analysis.plots import save_figure
from moe.analysis.plots_sweep import Band, chosen, draw_curves, draw_final
from moe.analysis.run_files import ReportError
from moe.analysis.seeds import Estimate, estimate
from moe.analysis.sweep_csv import write_csv
from moe.analysis.sweep_runs import TAIL, OneRun, Runs
from moe.analysis.variants import SHARES, Comparison, Variant, View, compare, find_variants, views

METRIC, CURVE = "mean_bits_per_byte", "loss/lm"
_TITLES = {METRIC: "held-out bits/byte", CURVE: "training loss, nats per token"}
_POINTS = 240
_DASH = "–"


def write_sweep_report(
    runs: Runs, page: Path, folder: Path, *, baseline: str | None = None, metric: str = METRIC, written: str = "",
    remark: str = "",
) -> Path:  # fmt: skip
    """Writes the page, and its pictures and tables into `folder`; returns the page.

    `metric` is compared at the end, and followed while training if it is logged then, else the loss is. `written`
    says how and when; `remark` is a sentence for the reader. Raises ReportError.
    """
    logged = {key for run in runs.runs for key in (run.records[-1] if run.records else ())}
    curve = metric if metric in logged else CURVE
    variants = find_variants(runs, metric, curve)
    baseline = baseline or runs.baseline
    names = {run.name for run in runs.runs}
    if baseline is not None and baseline not in names:
        raise ReportError(f"baseline = {baseline!r}: is none of {', '.join(sorted(names))}")
    folder.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    both, end = views(variants), compare(variants, baseline, {one.name: one.values for one in variants})
    parts = [f"# {page.parent.resolve().parent.name if page.name == 'report.md' else page.stem}, compared", written]
    if variants:
        draw(folder, variants, baseline, both, metric, curve)
        where = folder.name + "/" if folder.resolve() != page.parent.resolve() else ""
        parts += results(variants, metric, where)
        parts += paired_table(variants, baseline, end, metric)
        parts += matched(variants, baseline, both, curve, where)
    else:
        parts += ["No run is finished yet."]
    write_csv(folder, runs, variants, baseline, both, metric, curve, end)
    parts += left_out(runs)
    page.write_text("\n\n".join(part for part in (*parts, remark) if part) + "\n", encoding="utf-8")
    return page


def draw(
    folder: Path, variants: Sequence[Variant], baseline: str | None, both: Sequence[View], metric: str, curve: str
) -> None:
    """`curves.png` and `final.png`."""
    panels = {view.unit: ({one.name: band(one, view) for one in variants}, view.end) for view in both}
    named = chosen([one.name for one in variants], baseline)
    longest = max(len(one.name) for one in variants)

    def curves(figure: Figure) -> None:
        draw_curves(figure, panels, named, baseline, title_of(curve))

    def final(figure: Figure) -> None:
        values = {one.name: list(one.values.values()) for one in variants}
        draw_final(figure.subplots(), values, {one.name: one.estimate for one in variants}, baseline, title_of(metric))

    save_figure(folder / "curves.png", (13 + 0.08 * max(map(len, named)), 5.2), curves)
    save_figure(folder / "final.png", (7.5 + 0.09 * longest, 1.6 + 0.34 * len(variants)), final)


def band(variant: Variant, view: View) -> Band:
    """The curves of all seeds up to where the first of them ends."""
    tracks = variant.tracks.values()
    end = min((float(one.over(view.flops)[-1]) if one.tokens.size else 0.0) for one in tracks)
    points = np.linspace(WINDOW * view.end, max(end, WINDOW * view.end), _POINTS)
    return Band(points=points, values=np.array([one.at(points, WINDOW * view.end, view.flops) for one in tracks]))


def results(variants: Sequence[Variant], metric: str, where: str) -> list[str]:
    header = [
        "variant",
        title_of(metric),
        "sd",
        "95 % interval",
        "max violation",
        "dead experts",
        "dropped",
        "step, ms",
    ]
    header += ["parameters, active", "total", "seeds", "what it is"]
    rows = []
    for one in variants:
        found, runs = one.estimate, list(one.runs.values())
        load = ("max_violation", "dead", "dropped")
        mean = [estimate([run.tail(f"load/{name}", name == "dead") for run in runs]).mean for name in load]
        rows.append([
            f"`{one.name}`", _number(found.mean), _number(found.std), _interval(found),
            _cell("{:.2f}", mean[0]), _cell("{:.1f}", mean[1]), _cell("{:.2%}", mean[2]),
            _cell("{:.0f}", 1000 * min(run.step_s for run in runs)),
            *(_cell("{:,.0f}", runs[0].value(f"parameters/{kind}")) for kind in ("active", "total")),
            str(found.n), one.note,
        ])  # fmt: skip
    legend = (
        f"Means over seeds, lowest first; sd: standard deviation; interval: t distribution, seeds - 1 degrees of"
        f" freedom ({_DASH} for one seed; for two it is 12.7 standard errors to each side). Max violation E max(f) - 1,"
        f" mean over layers and the last {TAIL} steps; dead: experts with less than 1 % of their share, summed over"
        " layers, same steps; step: 10th percentile of a run, the smallest over seeds."
    )
    picture = f"![where each variant ended, by seed, with intervals]({where}final.png)"
    return ["## At the end", table(header, rows, words_last=True), legend, picture]


def paired_table(
    variants: Sequence[Variant], baseline: str | None, found: dict[str, Comparison], metric: str
) -> list[str]:
    if baseline is None:
        return ["No baseline is named, so nothing is compared: `--baseline VARIANT` of `launch.report` names one."]
    if baseline not in {one.name for one in variants}:
        return [f"The baseline `{baseline}` has no finished run, so nothing is compared."]
    rows = []
    for one in variants:
        if one.name in found:
            comparison = found[one.name]
            difference = comparison.difference.estimate
            cells = [_signed(difference.mean), _interval(difference, "{:+.4f}")]
            cells += [_p(comparison.difference.p), _p(comparison.p_holm), str(difference.n)]
            rows.append([f"`{one.name}`", *(cells if difference.n else [_DASH, _DASH, _DASH, _DASH, "0"])])
    header = ["variant", "difference", "95 % interval", "p", "p, Holm", "common seeds"]
    tests = sum(not math.isnan(comparison.difference.p) for comparison in found.values())
    legend = (
        f"{title_of(metric).capitalize()} minus that of `{baseline}` with the same seed, mean over the seeds that both"
        " have; negative is lower than the baseline. p: two-sided paired t test; Holm: corrected for the"
        f" {tests} tests of this table. One common seed gives a difference and no more."
    )
    return [f"## Paired with `{baseline}`", table(header, rows), legend]


def matched(
    variants: Sequence[Variant], baseline: str | None, both: Sequence[View], curve: str, where: str
) -> list[str]:
    parts = ["## On the way", f"![learning curves over tokens and over training FLOPs]({where}curves.png)"]
    parts += [
        f"{title_of(curve).capitalize()}; bands: 95 % interval of the mean for three seeds and more, the range of two."
    ]
    for view in both:
        if not view.end > 0:
            parts.append(f"Some run has no {title_of(curve)}, so there is no point of equal {view.unit}.")
            continue
        last = {one.name: view.at(one, view.points[-1]) for one in variants}
        found = compare(variants, baseline, last)
        rows = []
        for one in variants:
            cells = [_number(estimate(list(view.at(one, point).values())).mean) for point in view.points]
            if found:
                difference = found[one.name].difference.estimate if one.name in found else Estimate(0, 0, 0, 0)
                cells += [_signed(difference.mean), _interval(difference, "{:+.4f}")] if difference.n else [_DASH] * 2
            if view.flops:
                cells.append(_short(view.end / next(iter(one.tracks.values())).flops_per_token))
            rows.append([f"`{one.name}`", *cells, str(one.estimate.n)])
        header = ["variant", *(f"at {_short(point)}" for point in view.points)]
        header += ["difference at the last", "95 % interval"] if found else []
        header += ["tokens there"] if view.flops else []
        shares = ", ".join(f"{share:.0%}" for share in SHARES)
        parts += [
            f"### At equal {view.unit}",
            table([*header, "seeds"], rows),
            f"Mean over the {WINDOW:.0%} before each point; points: {shares} of the {_short(view.end)} {view.unit} of"
            " the shortest run" + (f"; difference to `{baseline}`, paired by seed." if found else "."),
        ]
    parts.append(
        "Tokens count padding. Training FLOPs are those of the model (`moe.plan.flops`): 6 a multiply-add, nothing for"
        " routing, exchange or recomputation. A run read before its end has not finished the decay of its learning"
        " rate, which a run read at its end has."
    )
    return parts


def left_out(runs: Runs) -> list[str]:
    if not runs.left_out:
        return []
    why = {run.folder: run.state.replace("|", "\\|") for run in runs.left_out}
    rows = [[f"`{_name(run)}`", f"{run.step:,} of {run.steps:,}", why[run.folder]] for run in runs.left_out]
    return ["## Not in the numbers above", table(["run", "step", "why"], rows, words_last=True)]


def title_of(metric: str) -> str:
    return _TITLES.get(metric, metric)


def _name(run: OneRun) -> str:
    return f"{run.name}, seed {run.seed}"


def _cell(form: str, value: float) -> str:
    return _DASH if math.isnan(value) else form.format(value)


def _number(value: float) -> str:
    return _cell("{:.4f}", value)


def _signed(value: float) -> str:
    return _cell("{:+.4f}", value)


def _p(value: float) -> str:
    return _cell("{:.3f}" if not value < 0.001 else "{:.1e}", value)


def _interval(found: Estimate, form: str = "{:.4f}") -> str:
    return _DASH if math.isnan(found.half) else f"{form.format(found.low)} to {form.format(found.high)}"


def _short(value: float) -> str:
    """1.23M for 1234567."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000 or prefix == "E":
            break
        value /= 1000
    return f"{value:.3g}{prefix}"
