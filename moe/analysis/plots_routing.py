"""Pictures of a final evaluation: bits per byte, and which experts the held-out text takes.

Layers may differ in their number of experts: `load_DL[domain][l]` is the load [E_l] of one layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure

from moe.analysis.plots import OKABE_ITO, Array, cell_borders, colour_of, label_layers, panel_grid, some_layers
from moe.analysis.plots_history import Curve, draw_loss
from moe.analysis.specialisation import chain

BASELINES = {"unigram": "unigram entropy", "gzip": "gzip -9", "xz": "xz -9e"}
_BASELINE_COLOURS = {"unigram": "#c9c9c9", "gzip": "#9a9a9a", "xz": "#6b6b6b"}
_MOST_LABELS = 32  # experts that still get a tick label each
_MOST_PAIRS = 24  # layers in the picture of pairs
_WIDEST_LIFT = 2.0  # log2: a quarter to four times as often


def draw_heat_maps(
    figure: Figure | SubFigure, load_DL: Mapping[str, Sequence[Array]], layers: Sequence[int], shown: Sequence[int],
    title: str,
) -> None:  # fmt: skip
    """Rows are domains, columns experts, colour `load * E`, white (1) is even use; a panel for each index in `shown`.

    Columns are sorted by the domain that uses the expert most and then by how much, so a diagonal staircase means
    that domains have experts of their own, and one even colour that they have not.
    """
    names = list(load_DL)
    shares = {index: np.array([load[index] for load in load_DL.values()]) for index in shown}
    shares = {index: share * share.shape[1] for index, share in shares.items()}
    top = float(np.clip(max(share.max() for share in shares.values()), 2.0, 6.0))
    rows, columns = panel_grid(len(shown))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    panels = list(grid.flat[: len(shown)])
    for axes, (index, share) in zip(panels, shares.items(), strict=True):
        order, experts = expert_order(share), share.shape[1]
        norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)
        image = axes.imshow(share[:, order], aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
        axes.set_title(f"layer {layers[index]}")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(experts) if experts <= _MOST_LABELS else [])
        if experts <= _MOST_LABELS:
            axes.set_xticklabels(order, fontsize=9 if experts <= 16 else 7)
        cell_borders(axes, *share.shape)
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
    load_DL: Mapping[str, Sequence[Array]],
    layers: Sequence[int],
    loss: Curve,
) -> None:
    """The picture for a README: routing (first, middle and last MoE layer at most), bits per byte, and the loss."""
    if load_DL:
        halves = figure.subfigures(1, 2, width_ratios=[1.08, 1], wspace=0.03)
        left, right = cast(Sequence[SubFigure], halves)
        shown = some_layers(len(layers))
        draw_heat_maps(left, load_DL, layers, shown, "Which experts each domain uses")
        panels = right.subplots(2, 1, height_ratios=[1.1, 1])
    else:
        panels = figure.subplots(1, 2)
    draw_bars(panels[0], domains)
    draw_loss(panels[1], loss)


def draw_chosen_prob(axes: Axes, by_domain: Mapping[str, Array], floor_L: Array, layers: Sequence[int]) -> None:
    """Top-k sum of every domain over the layers, and what equal scores would give."""
    place = np.arange(len(layers))
    for index, (name, values) in enumerate(by_domain.items()):
        colour, dash = colour_of(index)
        axes.plot(place, values, dash, color=colour, marker="o", markersize=4, label=name)
    axes.plot(place, floor_L, color="#9a9a9a", marker="_", linewidth=1.2, label="floor K / E: all scores equal")
    axes.set(title="Top-k sum: the router's probability on the experts a token takes", ylabel="mean probability")
    label_layers(axes, layers)
    axes.legend(ncols=1, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_overlap(figure: Figure, names: Sequence[str], overlap_DD: Array, hot_D: Sequence[int]) -> None:
    """Share of two domains' busy experts that they have in common; on the diagonal how many there are."""
    axes = figure.subplots()
    off_diagonal = np.where(np.eye(len(names), dtype=bool), np.nan, overlap_DD)
    image = axes.imshow(off_diagonal, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    for row in range(len(names)):
        for column in range(len(names)):
            value = overlap_DD[row, column]
            text = f"{hot_D[row]}" if row == column else "–" if np.isnan(value) else f"{value:.2f}"
            light = row != column and value > 0.6
            axes.text(column, row, text, ha="center", va="center", color="white" if light else "#333333", fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    cell_borders(axes, len(names), len(names))
    bar = figure.colorbar(image, ax=axes, aspect=25, pad=0.02)
    bar.set_label("experts in both / experts in either")
    bar.outline.set_visible(False)
    figure.suptitle("Busy experts (twice their share) that two domains have in common", x=0.02, ha="left")


def draw_pairs(figure: Figure, lift_L: Sequence[Array], layers: Sequence[int]) -> None:
    """log2 of the lift of every pair of experts; the experts of a layer in an order that puts companions together."""
    shown = some_layers(len(layers), _MOST_PAIRS)
    rows, columns = pair_grid(len(layers))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    panels = list(grid.flat[: len(shown)])
    for axes, index in zip(panels, shown, strict=True):
        with np.errstate(divide="ignore"):
            log_lift = np.log2(lift_L[index])
        order = chain(log_lift)
        value = np.clip(log_lift[np.ix_(order, order)], -_WIDEST_LIFT, _WIDEST_LIFT)
        axes.set_facecolor("#dddddd")
        image = axes.imshow(value, cmap="PuOr_r", vmin=-_WIDEST_LIFT, vmax=_WIDEST_LIFT, interpolation="nearest")
        axes.set_title(f"layer {layers[index]}")
        few = len(order) <= 16
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(len(order)) if few else [], [str(expert) for expert in order] if few else [])
        cell_borders(axes, *value.shape)
        if not few:
            axes.grid(visible=False, which="minor")
    for axes in panels[-columns:]:
        axes.set_xlabel("expert, next to its companions")
    bar = figure.colorbar(image, ax=panels, extend="both", pad=0.02, aspect=30, shrink=min(1.0, 1.6 / rows))
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    bar.set_label("times as often together as their loads say")
    bar.outline.set_visible(False)
    figure.suptitle("Which experts serve the same tokens (grey: too rare to say)", x=0.02, ha="left")


def draw_agreement(axes: Axes, agreement: Mapping[str, Sequence[float]], layers: Sequence[int], title: str) -> None:
    """How much of the routing two checkpoints share, over the layers."""
    place = np.arange(len(layers))
    series = {
        "kept": ("assignments kept", OKABE_ITO[0], "-"),
        "jaccard": ("common / all experts of a token", OKABE_ITO[2], "-"),
        "chance": ("kept by chance, at these loads", "#9a9a9a", "--"),
    }
    for key, (label, colour, dash) in series.items():
        axes.plot(place, agreement[key], dash, color=colour, marker="o", markersize=4, label=label)
    axes.set(title=title, ylabel="share", ylim=(0.0, 1.02))
    label_layers(axes, layers)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def pair_grid(layers: int) -> tuple[int, int]:
    """Rows and columns of the panels of `draw_pairs`."""
    shown = min(layers, _MOST_PAIRS)
    columns = min(shown, 3 if shown <= 6 else 6)
    return -(-shown // columns), columns


def heat_map_size(domains: int, layers: int) -> tuple[float, float]:
    """Width and height, in hundreds of pixels, of a picture that holds `draw_heat_maps` of so many panels."""
    rows, columns = panel_grid(layers)
    return 10.0 if columns == 1 else 24.0, 1.4 + rows * (0.9 + 0.36 * domains)


def expert_order(share_DE: Array) -> list[int]:
    """Experts sorted by the row that uses them most, and within a row by falling use; ties by index."""
    owner = share_DE.argmax(axis=0)
    return sorted(range(share_DE.shape[1]), key=lambda expert: (owner[expert], -share_DE[owner[expert], expert]))
