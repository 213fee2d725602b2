"""How every picture of a report looks: style, colours, saving, and the small pieces that several pictures share.

Only matplotlib's object API: no pyplot, no global backend, so a notebook that imports this keeps its own. Colours are
those of Okabe and Ito, which colour-blind readers can tell apart; layers, which are ordered, take a sequential map.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

Array = NDArray[np.float64]

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # the next round of colours, when there are more curves than colours
MOST_PANELS = 3  # layers in a picture that shows only some of them
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


def save_figure(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draws a picture of `size` hundreds of pixels with this module's style and writes it as PNG."""
    with matplotlib.rc_context(_STYLE):  # put back on leaving
        engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=size, dpi=100, layout=engine)
        draw(figure)
        # Without the name of the program in it, the same run gives the same bytes.
        figure.savefig(path, metadata={"Software": None})


def colour_of(index: int) -> tuple[str, str]:
    """(colour, dash) of the curve with this index."""
    return OKABE_ITO[index % 6], DASHES[index // 6 % len(DASHES)]


def some_layers(count: int, most: int = MOST_PANELS) -> list[int]:
    """Indices of at most `most` of `count` layers, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def label_layers(axes: Axes, layers: Sequence[int]) -> None:
    """Names the layers under an axis on which they stand at 0, 1, 2, ..."""
    shown = some_layers(len(layers), 24)
    axes.set_xticks(shown, [str(layers[index]) for index in shown])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer")


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


def panel_grid(panels: int) -> tuple[int, int]:
    """Rows and columns that hold so many wide panels."""
    columns = 1 if panels <= 4 else 3
    return -(-panels // columns), columns


def cell_borders(axes: Axes, rows: int, columns: int) -> None:
    """White lines between the cells of an image; only while there is room for them."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns <= 64:
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
