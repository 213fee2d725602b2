"""Pictures of what a run logged while it trained, drawn into matplotlib axes handed to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe.analysis.plots import OKABE_ITO, Array, colour_of, moving_average, some_layers


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the run: `values` has shape [n] for a scalar and [n, L] for a value a layer."""

    steps: Array
    values: Array


ROWS = {
    "load/max_violation": ("Busiest expert: should near 0, even load (1 = twice its share)", "max violation"),
    "load/max_violation_micro": ("The same in each micro-batch (mean over them)", "max violation"),
    "load/entropy": ("Evenness of the load: should near 1 (0 = one expert takes all)", "normalised entropy"),
    "load/dropped": ("Dropped: should stay near 0", "dropped assignments"),
    "load/idle_max": ("Longest wait of an expert for a token: should stay near 0", "updates without a token"),
    "router/chosen_prob": ("Top-k sum: the router's probability on the experts a token takes", "probability"),
    "router/margin": ("Margin: last expert taken minus first left out", "score"),
}
"""Title and unit of the metrics that have a value a layer."""


def draw_loss(axes: Axes, loss: Curve) -> None:
    """Training loss in nats per token: every record in light, the moving average in full."""
    smooth = moving_average(loss.values)
    axes.plot(loss.steps, loss.values, color=OKABE_ITO[0], alpha=0.25, linewidth=1.0)
    axes.plot(loss.steps, smooth, color=OKABE_ITO[0])
    _limit_to(axes, smooth)
    axes.set(title="Training loss: should fall, without spikes", xlabel="step", ylabel="nats per token")


def draw_validation(axes: Axes, domains: Mapping[str, Curve], mean: Curve | None) -> None:
    """Validation bits per byte of every domain over the steps, and their mean in black."""
    for index, (name, curve) in enumerate(domains.items()):
        colour, dash = colour_of(index)
        axes.plot(curve.steps, curve.values, dash, color=colour, marker="o", markersize=3.5, label=name)
    if mean is not None:
        axes.plot(mean.steps, mean.values, color="#000000", linewidth=2.6, label="mean")
    axes.set(title="Validation: should fall in every domain", xlabel="step", ylabel="bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=2 if len(domains) <= 10 else 3)


def draw_layers(axes: Axes, curve: Curve, layers: Sequence[int], title: str, unit: str) -> None:
    """One smoothed line a layer, dark for the first and bright for the last."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(layers)))
    named = set(np.linspace(0, len(layers) - 1, min(len(layers), 8)).round().astype(int).tolist())
    for index, layer in enumerate(layers):
        values = curve.values[:, index]
        label = f"layer {layer}" if index in named else None
        axes.plot(curve.steps, moving_average(values), color=colours[index], label=label, zorder=3)
        if len(layers) <= 4:
            axes.plot(curve.steps, values, color=colours[index], alpha=0.2, linewidth=0.8)
    axes.set(title=title, ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_rows(figure: Figure, curves: Mapping[str, Curve], layers: Sequence[int]) -> None:
    """One row a metric, titled by `ROWS`; the range of an expert bias by its rule's name."""
    for index, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(len(curves), 1, index + 1)
        rule = name.removeprefix("balance/").removesuffix("/range")
        title, unit = ROWS.get(name, (f"Largest minus smallest bias of the rule {rule}", "score"))
        draw_layers(axes, curve, layers, title, unit)
        if name not in ("load/entropy", "router/chosen_prob"):
            axes.set_ylim(bottom=0)
        if name == "load/dropped":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_xlabel("step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def draw_histogram(figure: Figure, bins: Mapping[float, Curve], layers: Sequence[int]) -> None:
    """How many experts have which load, as a stack over the steps; first, middle and last layer at most.

    `bins` goes from the lower end of a bin, in units of the even share, to the number of experts in it, [n, L].
    """
    edges = sorted(bins)
    shown = some_layers(len(layers))
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)] + [f"{edges[-1]:g} or more"]
    colours = matplotlib.colormaps["PuOr_r"](np.linspace(0.02, 0.98, len(edges)))
    grid = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, index in zip(grid, shown, strict=True):
        stacked = [moving_average(bins[low].values[:, index]) for low in edges]
        axes.stackplot(bins[edges[0]].steps, stacked, labels=names, colors=colours, linewidth=0)
        axes.set(title=f"layer {layers[index]}", xlabel="step")
        axes.margins(x=0, y=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False)
    grid[0].set_ylabel("experts")
    figure.suptitle("How many experts have which load: should gather around 1", x=0.02, ha="left")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", title="load × number\nof experts")


def _limit_to(axes: Axes, smooth: Array) -> None:
    """Keeps one spike of the raw curve from flattening the whole picture."""
    finite = smooth[np.isfinite(smooth)]
    if finite.size and finite.max() > finite.min():
        margin = 0.08 * (finite.max() - finite.min())
        axes.set_ylim(finite.min() - margin, finite.max() + margin)
