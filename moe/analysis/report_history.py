"""The sections of a report that come from `metrics.jsonl`: what happened while the run trained."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moe.analysis.markdown import number, table
from moe.analysis.plots import save_figure
from moe.analysis.plots_history import Curve, draw_histogram, draw_loss, draw_rows, draw_validation
from moe.analysis.run_files import RunFiles, curve, layer_curve
from moe.train.events import FINISHED, STARTED

_EVAL_KEY = "eval/bits_per_byte"
_BIN_KEY = "load/histogram/from_"
_LOAD = ("max_violation", "entropy", "dropped", "idle_max")
_MANY = 30
"""Events that the report shows at most."""
PICTURES = ("training.png", "load.png", "histogram.png", "router.png")


def training(folder: Path, run: RunFiles) -> list[str]:
    """Loss and validation over the steps."""
    loss, mean = loss_curve(run.records), curve(run.records, _EVAL_KEY)
    keys = dict.fromkeys(key for record in run.records for key in record if key.startswith(_EVAL_KEY + "/"))
    found = {key.removeprefix(_EVAL_KEY + "/"): curve(run.records, key) for key in keys}
    domains = {name: values for name, values in found.items() if values is not None}
    if loss is None:
        return ["## Training", "The metrics of this run have no loss."]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if domains else 1, squeeze=False)[0]
        draw_loss(panels[0], loss)
        if domains:
            draw_validation(panels[1], domains, mean)

    save_figure(folder / "training.png", (14 if domains else 8, 5.5), draw)
    missing = [] if domains else ["This run was not evaluated while it trained."]
    return ["## Training", *missing, "![training loss and validation bits per byte](training.png)"]


def events(run: RunFiles) -> list[str]:
    """What happened beside training; nothing for a run that began and finished."""
    if all(entry["event"] in (STARTED, FINISHED) for entry in run.events):
        return []
    rows = []
    for entry in run.events[-_MANY:]:
        more = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("time", "event", "step"))
        rows.append([entry["time"], number(entry.get("step")), entry["event"], more.replace("|", "/") or "–"])
    left = len(run.events) - len(rows)
    heading = ["## Events", *([f"The last {len(rows)}; {left} came before them."] if left else [])]
    return [*heading, table(["time", "step", "event", "more"], rows, words_last=True)]


def load_over_time(folder: Path, run: RunFiles) -> list[str]:
    """Load, its histogram and the router's scores over the steps, for every layer."""
    keys = [f"load/{name}" for name in _LOAD]
    micro, whole = (layer_curve(run.records, f"load/max_violation{end}") for end in ("_micro", ""))
    if micro is not None and whole is not None and (micro.values != whole.values).any():  # else it is the same curve
        keys.insert(1, "load/max_violation_micro")
    parts = _rows(folder / "load.png", run, keys, "load over time")
    if not parts:
        return ["## Load over time", "This run logged no load: its model has no MoE layer."]
    parts += _histogram(folder, run)
    logged = sorted({key for record in run.records[-1:] for key in record})
    biases = [key for key in logged if key.startswith("balance/") and key.endswith("/range")]
    scores = _rows(folder / "router.png", run, ["router/chosen_prob", "router/margin", *biases], "scores over time")
    legend = (
        "Margin: by how much the last expert taken beat the first one left out, mean over real tokens, in the units of "
        "the router's selection scores. A small one means that a small change would route the token elsewhere."
    )
    return ["## Load over time", *parts, *(["## Scores over time", *scores, legend] if scores else [])]


def loss_curve(records: list[dict[str, Any]]) -> Curve | None:
    """The language-model loss alone where it is logged, since balance terms say nothing about the text."""
    alone = curve(records, "loss/lm")
    return curve(records, "loss") if alone is None else alone


def _rows(path: Path, run: RunFiles, keys: list[str], title: str) -> list[str]:
    """A picture with a row for each of these metrics that the run has."""
    found = {key: layer_curve(run.records, key) for key in keys}
    curves = {key: values for key, values in found.items() if values is not None}
    if not curves:
        return []
    layers = run.layers_of(next(iter(curves.values())))
    save_figure(path, (11, 1 + 2.8 * len(curves)), lambda figure: draw_rows(figure, curves, layers))
    return [f"![{title}]({path.name})"]


def _histogram(folder: Path, run: RunFiles) -> list[str]:
    keys = sorted({key for record in run.records for key in record if key.startswith(_BIN_KEY)})
    found = {float(key.removeprefix(_BIN_KEY)): layer_curve(run.records, key) for key in keys}
    bins = {low: values for low, values in found.items() if values is not None}
    if len(bins) < 2:
        return []
    layers = run.layers_of(next(iter(bins.values())))
    size = (5 + 3.2 * min(3, len(layers)), 5.0)
    save_figure(folder / "histogram.png", size, lambda figure: draw_histogram(figure, bins, layers))
    return ["![experts by load, over time](histogram.png)"]
