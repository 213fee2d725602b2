"""Pictures of a sweep: learning curves with the spread over seeds, and where each variant ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from moe.analysis.plots import OKABE_ITO, Array, colour_of
from moe.analysis.seeds import Estimate, t_quantile

MOST_COLOURS = 6
"""Variants that stand out in a picture of many; the others are grey."""
_GREY = "#c4c4c4"


@dataclass(frozen=True, kw_only=True)
class Band:
    """The curves of a variant's seeds at the same points: `values` is [seeds, points], nan beyond a run's end."""

    points: Array
    values: Array

    @property
    def mean(self) -> Array:
        return np.asarray(self.values.mean(axis=0))

    def spread(self) -> tuple[Array, Array]:
        """The t interval for three seeds and more, the range of two."""
        n = len(self.values)
        if n < 3:
            return self.values.min(axis=0), self.values.max(axis=0)
        half = t_quantile(0.975, n - 1) * self.values.std(axis=0, ddof=1) / np.sqrt(n)
        return self.mean - half, self.mean + half


def chosen(order: Sequence[str], baseline: str | None) -> list[str]:
    """Variants drawn in colour: all of few; of many the baseline, the best ones and the last. `order`: best first."""
    if len(order) <= MOST_COLOURS:
        return list(order)
    others = [name for name in order if name != baseline]
    room = MOST_COLOURS - (len(others) < len(order))
    named = {*others[: room - 1], others[-1], baseline}
    return [name for name in order if name in named]


def draw_curves(
    figure: Figure, panels: Mapping[str, tuple[Mapping[str, Band], float]], named: Sequence[str],
    baseline: str | None, metric: str,
) -> None:  # fmt: skip
    """A panel each for tokens and FLOPs: the bands of all variants, and where the shortest run ends."""
    grid = figure.subplots(1, len(panels))
    for axes, (unit, (bands, end)) in zip(grid, panels.items(), strict=True):
        for name, band in bands.items():
            if name not in named:
                axes.plot(band.points, band.mean, color=_GREY, linewidth=1.0, zorder=1)
        for name, (colour, dash) in _colours(named, baseline).items():
            band = bands[name]
            label = f"{name} (baseline)" if name == baseline else name
            axes.fill_between(band.points, *band.spread(), color=colour, alpha=0.15, linewidth=0, zorder=2)
            axes.plot(band.points, band.mean, dash, color=colour, label=label, zorder=3)
        axes.axvline(end, color="#777777", linewidth=1.0, linestyle=":")
        axes.set(title=f"At equal {unit}", xlabel=unit, ylabel=metric)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(left=0)
        _limit_to_the_end(axes, [band.mean for band in bands.values()])
    grey = len(next(iter(panels.values()))[0]) - len(named)
    note = f"{grey} others in grey" if grey else None
    legend = figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside right upper", title=note, alignment="left"
    )
    legend.get_title().set_fontsize(10)


def _colours(named: Sequence[str], baseline: str | None) -> dict[str, tuple[str, str]]:
    """The baseline in black, so that the others keep the colours that are told apart."""
    others = [name for name in named if name != baseline]
    found = {name: colour_of(index) for index, name in enumerate(others)}
    return {name: found.get(name, ("#000000", "-")) for name in named}


def _limit_to_the_end(axes: Axes, curves: Sequence[Array]) -> None:
    """The first tenth falls so steeply that it would hide the differences: it may leave the picture."""
    late = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    late = late[np.isfinite(late)]
    if late.size:
        margin = 0.06 * (late.max() - late.min()) or 0.1
        axes.set_ylim(late.min() - margin, late.max() + margin)


def draw_final(
    axes: Axes,
    values: Mapping[str, Sequence[float]],
    estimates: Mapping[str, Estimate],
    baseline: str | None,
    metric: str,
) -> None:
    """A row a variant, best on top: each seed as a ring, the mean as a dot, its interval as a bar."""
    names = list(values)
    rows = np.arange(len(names))[::-1]
    for row, name in zip(rows, names, strict=True):
        colour = "#000000" if name == baseline else OKABE_ITO[0]
        found = estimates[name]
        if found.n > 1:
            axes.plot([found.low, found.high], [row, row], color=colour, linewidth=2.2, alpha=0.45, zorder=2)
        axes.plot(values[name], np.full(len(values[name]), row), "o", color=colour, markersize=6.5, fillstyle="none")
        axes.plot([found.mean], [row], "o", color=colour, markersize=5, zorder=3)
    if baseline is not None and baseline in values:
        axes.axvline(estimates[baseline].mean, color="#777777", linewidth=1.0, linestyle=":", zorder=1)
    axes.set_yticks(rows, names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(visible=False, axis="y")
    axes.set(title="Each seed (ring), mean (dot), 95 % interval (bar)", xlabel=metric)
    _limit_to_dots(axes, values, estimates)


def _limit_to_dots(axes: Axes, values: Mapping[str, Sequence[float]], estimates: Mapping[str, Estimate]) -> None:
    """Intervals of two seeds are so wide that they may leave the picture; dots and the others' intervals do not."""
    ends = [value for found in values.values() for value in found]
    ends += [end for found in estimates.values() if found.n > 2 for end in (found.low, found.high)]
    finite = [end for end in ends if np.isfinite(end)]
    if finite:
        margin = 0.05 * (max(finite) - min(finite)) or 0.05
        axes.set_xlim(min(finite) - margin, max(finite) + margin)
