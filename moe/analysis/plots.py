"""The plots of a run, as functions that draw into matplotlib axes handed to them, and one that composes and saves them.

Only matplotlib's object API: no pyplot, no global backend, so a notebook that imports this keeps its own. Colours are
those of Okabe and Ito, which colour-blind readers can tell apart; layers, which are ordered, take a sequential map.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

Array = NDArray[np.float64]

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")  # the next round of colours, when there are more curves than colours
_INK = "#333333"
_STYLE: dict[Any, Any] = {  # matplotlib types the keys as one huge Literal
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
}
BASELINES = {"unigram": "unigram entropy", "gzip": "gzip -9", "xz": "xz -9e"}
_BASELINE_COLOURS = {"unigram": "#c9c9c9", "gzip": "#9a9a9a", "xz": "#6b6b6b"}
_MOST_PANELS = 3  # layers in the overview
_MOST_LABELS = 32  # experts that still get a tick label each


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the run: `values` has shape [n] for a scalar and [n, L] for a value a layer."""

    steps: Array
    values: Array


def save_figure(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draws a picture of `size` hundreds of pixels with this module's style and writes it as PNG."""
    with matplotlib.rc_context(_STYLE):  # put back on leaving
        engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=size, dpi=100, layout=engine)
        draw(figure)
        # Without the name of the program in it, the same run gives the same bytes.
        figure.savefig(path, metadata={"Software": None})


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
        colour, dash = OKABE_ITO[index % 6], _DASHES[index // 6 % len(_DASHES)]
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


def draw_balance(figure: Figure, curves: Mapping[str, Curve], layers: Sequence[int]) -> None:
    """Load over time in up to three rows: `max_violation`, `entropy` and `dropped`, whichever the run has."""
    rows = {
        "max_violation": ("Busiest expert: should near 0, even load (1 = twice its share)", "max violation"),
        "entropy": ("Evenness of the load: should near 1 (0 = one expert takes all)", "normalised entropy"),
        "dropped": ("Dropped: should stay near 0", "dropped assignments"),
    }
    shown = [name for name in rows if name in curves]
    for index, name in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, index + 1)
        draw_layers(axes, curves[name], layers, *rows[name])
        if name != "entropy":
            axes.set_ylim(bottom=0)
        if name == "dropped":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_xlabel("step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def draw_heat_maps(
    figure: Figure | SubFigure, load_DLE: Mapping[str, Array], layers: Sequence[int], shown: Sequence[int], title: str
) -> None:
    """Rows are domains, columns experts, colour `load * E`, white (1) is even use; a panel for each index in `shown`.

    Columns are sorted by the domain that uses the expert most and then by how much, so a diagonal staircase means
    that domains have experts of their own, and one even colour that they have not.
    """
    names = list(load_DLE)
    shares = {index: np.array([load[index] for load in load_DLE.values()]) for index in shown}
    experts = next(iter(shares.values())).shape[1]
    shares = {index: share * experts for index, share in shares.items()}
    top = float(np.clip(max(share.max() for share in shares.values()), 2.0, 6.0))
    rows, columns = _panel_grid(len(shown))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    panels = list(grid.flat[: len(shown)])
    for axes, (index, share) in zip(panels, shares.items(), strict=True):
        order = expert_order(share)
        norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)
        image = axes.imshow(share[:, order], aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
        axes.set_title(f"layer {layers[index]}")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(experts) if experts <= _MOST_LABELS else [])
        if experts <= _MOST_LABELS:
            axes.set_xticklabels(order, fontsize=9 if experts <= 16 else 7)
        _cell_borders(axes, *share.shape)
    for axes in panels[-columns:]:
        axes.set_xlabel("expert, sorted by the domain that uses it most")
    extend = "max" if any(share.max() > top for share in shares.values()) else "neither"
    bar = figure.colorbar(image, ax=panels, extend=extend, pad=0.02, aspect=30)
    ticks = [0.0, 0.5, 1.0, *range(2, int(top) + 1)]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.set_label("load × number of experts  (1 = uniform)")
    bar.outline.set_visible(False)
    figure.suptitle(title, x=0.02, ha="left")


def draw_bars(axes: Axes, domains: Mapping[str, Mapping[str, Any]]) -> None:
    """Bits per byte of the model beside those of the baselines, on the same held-out bytes of every domain."""
    series = {"bits_per_byte": ("this model", OKABE_ITO[0])}
    series |= {key: (label, _BASELINE_COLOURS[key]) for key, label in BASELINES.items()}
    place = np.arange(len(domains))
    left = place - 0.42
    for key, (label, colour) in series.items():
        width = 0.3 if key == "bits_per_byte" else 0.18  # the model's bar has to hold its number
        heights = [np.nan if domain.get(key) is None else float(domain[key]) for domain in domains.values()]
        bars = axes.bar(left, heights, width * 0.92, align="edge", color=colour, label=label)
        left = left + width
        if key == "bits_per_byte" and len(domains) <= 10:
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9, color=colour, fontweight="bold")
    axes.set_xticks(place, list(domains), rotation=0 if len(domains) <= 8 else 45)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.18)  # room for the legend
    axes.legend(ncols=4, loc="upper center", columnspacing=1.2, handlelength=1.2)
    axes.set(title="Held-out bits per byte: lower is better", ylabel="bits per byte")


def draw_overview(
    figure: Figure,
    domains: Mapping[str, Mapping[str, Any]],
    load_DLE: Mapping[str, Array],
    layers: Sequence[int],
    loss: Curve,
) -> None:
    """The picture for a README: routing (first, middle and last MoE layer at most), bits per byte, and the loss."""
    if load_DLE:
        halves = figure.subfigures(1, 2, width_ratios=[1.08, 1], wspace=0.03)
        left, right = cast(Sequence[SubFigure], halves)
        shown = np.unique(np.linspace(0, len(layers) - 1, min(_MOST_PANELS, len(layers))).round().astype(int)).tolist()
        draw_heat_maps(left, load_DLE, layers, shown, "Which experts each domain uses")
        panels = right.subplots(2, 1, height_ratios=[1.1, 1])
    else:
        panels = figure.subplots(1, 2)
    draw_bars(panels[0], domains)
    draw_loss(panels[1], loss)


def heat_map_size(domains: int, layers: int) -> tuple[float, float]:
    """Width and height, in hundreds of pixels, of a picture that holds `draw_heat_maps` of so many panels."""
    rows, columns = _panel_grid(layers)
    return 10.0 if columns == 1 else 24.0, 1.4 + rows * (0.9 + 0.36 * domains)


def expert_order(share_DE: Array) -> list[int]:
    """Experts sorted by the row that uses them most, and within a row by falling use; ties by index."""
    owner = share_DE.argmax(axis=0)
    return sorted(range(share_DE.shape[1]), key=lambda expert: (owner[expert], -share_DE[owner[expert], expert]))


def moving_average(values: Array) -> Array:
    """Centred mean over about 1/40 of the run, over the finite values of the window alone; nan where it has none."""
    width = max(1, len(values) // 40)
    width += 1 - width % 2
    finite = np.isfinite(values)
    # mode "full" cut by hand: "same" gives the length of the window where the run is shorter than it.
    first = width // 2
    total, count = (
        np.convolve(part, np.ones(width))[first : first + len(values)]
        for part in (np.where(finite, values, 0.0), finite.astype(np.float64))
    )
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _limit_to(axes: Axes, smooth: Array) -> None:
    """Keeps one spike of the raw curve from flattening the whole picture."""
    finite = smooth[np.isfinite(smooth)]
    if finite.size and finite.max() > finite.min():
        margin = 0.08 * (finite.max() - finite.min())
        axes.set_ylim(finite.min() - margin, finite.max() + margin)


def _panel_grid(panels: int) -> tuple[int, int]:
    columns = 1 if panels <= 4 else 3
    return -(-panels // columns), columns


def _cell_borders(axes: Axes, rows: int, columns: int) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns <= 64:
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
