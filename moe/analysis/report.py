"""The report of a run: plots and `report.md` in `workdir/report`, and the flat numbers of `workdir/summary.json`.

Reads raw JSON only (`metrics.jsonl`, `evaluation.json`, `config.json`), so a report can be written on any machine, for
a run of any version, without the model. What a run does not have is left out and said so.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.analysis import plots
from moe.analysis.plots import Array, Curve
from moe.analysis.specialisation import (
    dead_experts,
    domain_distance,
    max_violation,
    normalised_entropy,
    pooled_load,
    top_experts,
)
from moe.train.metrics import JSONL_NAME, read_metrics

_EVAL_KEY = "eval/bits_per_byte"
_TOP_EXPERTS = 3
_ROUTING_TITLE = "Which experts each domain uses: stripes of its own, or white?"
_PICTURES = ("overview.png", "baselines.png", "training.png", "load.png", "routing.png")


class ReportError(ValueError):
    """A run folder that no report can be made of; the message is one line."""


def write_report(workdir: Path) -> Path:
    """Writes `report/*.png`, `report/report.md` and `summary.json` of the run in `workdir`; returns the Markdown file.

    `summary.json` keeps the entries it already had, and overwrites those of the same name.

    Raises: ReportError where the folder or its metrics are missing or cannot be read.
    """
    records = _read_records(workdir)
    evaluation = _read_json(workdir / "evaluation.json")
    summary = _read_json(workdir / "summary.json") | _summary(records, evaluation)
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    for name in _PICTURES:  # one that this report leaves out must not survive from the report before
        (folder / name).unlink(missing_ok=True)
    parts = [
        "# Report",
        _facts(summary),
        *_overview(folder, records, evaluation),
        *_compression(folder, evaluation),
        *_training(folder, records),
        *_balance(folder, records, evaluation),
        *_specialisation(folder, evaluation),
        *_config(workdir),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return path


def curve(records: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """The metric `key` over the records that have it; None where none does."""
    found = [(record["step"], record[key]) for record in records if key in record]
    if not found:
        return None
    steps, values = zip(*found, strict=True)
    return Curve(steps=np.array(steps, np.float64), values=np.array(values, np.float64))


def loads(evaluation: Mapping[str, Any]) -> dict[str, Array]:
    """The load of every domain, shape [L, E]; empty for a model without MoE layers."""
    found = {name: domain.get("load") for name, domain in evaluation.get("domains", {}).items()}
    return {name: np.array(load, np.float64) for name, load in found.items() if load}


def _read_records(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / JSONL_NAME
    if not workdir.is_dir():
        raise ReportError(f"{workdir} is not a folder")
    if not path.is_file():
        raise ReportError(f"{workdir} has no {JSONL_NAME}: it is not the folder of a run")
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise ReportError(str(error)) from error
    if not records:
        raise ReportError(f"{path} has no records yet")
    return records


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error


def _summary(records: list[dict[str, Any]], evaluation: Mapping[str, Any]) -> dict[str, float | str]:
    """Flat numbers: `bits_per_byte/<domain>`, `load/domain_distance/layer_3`, ...; a number a run lacks has no entry.

    As in the metrics, a loss that is not finite becomes a string, since JSON has no word for it.
    """
    last = records[-1]
    summary: dict[str, Any] = {"steps": last["step"]}
    summary |= {key: last[key] for key in ("tokens", "loss", "loss/lm") if key in last}
    speed = curve(records, "time/tokens_per_s")
    if speed is not None:
        summary["time/tokens_per_s"] = float(np.median(speed.values))
    summary |= {key: evaluation[key] for key in ("seconds", "seed", "mean_bits_per_byte") if key in evaluation}
    if "step" in evaluation:
        summary["evaluation_step"] = evaluation["step"]
    summary |= {f"parameters/{kind}": count for kind, count in evaluation.get("parameters", {}).items()}
    for name, domain in evaluation.get("domains", {}).items():
        for key in ("bits_per_byte", *plots.BASELINES):
            if domain.get(key) is not None:
                summary[f"{key}/{name}"] = domain[key]
    for layer, numbers in zip(_layers(evaluation), _layer_numbers(evaluation), strict=True):
        summary |= {f"load/{key}/layer_{layer}": value for key, value in numbers.items()}
    return {key: value if np.isfinite(value) else str(value) for key, value in summary.items()}


def _layers(evaluation: Mapping[str, Any]) -> list[int]:
    found = loads(evaluation)
    count = len(next(iter(found.values()))) if found else 0
    return list(evaluation.get("load_layers", range(count))) if found else []


def _layer_numbers(evaluation: Mapping[str, Any]) -> list[dict[str, float]]:
    """A dict of specialisation numbers for every MoE layer; the load is pooled over domains by their tokens."""
    found = loads(evaluation)
    if not found:
        return []
    domains = evaluation["domains"]
    pooled = pooled_load(found, {name: float(domains[name].get("tokens", 1)) for name in found})
    numbers: dict[str, NDArray[Any]] = {
        "max_violation": max_violation(pooled),
        "entropy": normalised_entropy(pooled),
        "dead": dead_experts(pooled),
    }
    if len(found) > 1:
        numbers["domain_distance"] = domain_distance(found)
    return [{key: values[index].item() for key, values in numbers.items()} for index in range(len(pooled))]


def _facts(summary: Mapping[str, Any]) -> str:
    names = {
        "steps": "steps",
        "tokens": "training tokens",
        "seconds": "time (s)",
        "time/tokens_per_s": "speed (tokens/s, median)",
        "parameters/total": "parameters",
        "parameters/active": "active parameters a token",
        "seed": "seed",
        "loss/lm": "last training loss (nats per token)",
        "evaluation_step": "evaluated after step",
        "mean_bits_per_byte": "held-out bits per byte, mean over domains",
    }
    rows = [[label, _number(summary[key])] for key, label in names.items() if key in summary]
    return _table(["", "this run"], rows)


def _overview(folder: Path, records: list[dict[str, Any]], evaluation: Mapping[str, Any]) -> list[str]:
    loss, domains = _loss(records), evaluation.get("domains", {})
    if loss is None or not domains:
        return []
    found, layers = loads(evaluation), _layers(evaluation)
    plots.save_figure(
        folder / "overview.png", (16, 9), lambda figure: plots.draw_overview(figure, domains, found, layers, loss)
    )
    return ["![routing, bits per byte and loss at a glance](overview.png)"]


def _compression(folder: Path, evaluation: Mapping[str, Any]) -> list[str]:
    domains = evaluation.get("domains", {})
    if not domains:
        return ["## Bits per byte", "This run has no final evaluation (`evaluation.json`) yet."]
    rows = [
        [name, *(_number(domain.get(key)) for key in ("bytes", "bits_per_byte", *plots.BASELINES))]
        for name, domain in domains.items()
    ]
    if evaluation.get("mean_bits_per_byte") is not None:
        means = [_mean([domain.get(key) for domain in domains.values()]) for key in plots.BASELINES]
        rows.append(["**mean**", "", _number(evaluation["mean_bits_per_byte"]), *map(_number, means)])
    plots.save_figure(folder / "baselines.png", (11, 5.5), lambda figure: plots.draw_bars(figure.subplots(), domains))
    note = "The baselines adapt to the very bytes they are scored on; the model has never seen them."
    header = ["domain", "held-out bytes", "bits per byte", *plots.BASELINES.values()]
    return ["## Bits per byte", _table(header, rows), note, "![bits per byte by domain](baselines.png)"]


def _training(folder: Path, records: list[dict[str, Any]]) -> list[str]:
    loss, mean = _loss(records), curve(records, _EVAL_KEY)
    keys = dict.fromkeys(key for record in records for key in record if key.startswith(_EVAL_KEY + "/"))
    found = {key.removeprefix(_EVAL_KEY + "/"): curve(records, key) for key in keys}
    domains = {name: values for name, values in found.items() if values is not None}
    if loss is None:
        return ["## Training", "The metrics of this run have no loss."]

    def draw(figure: plots.Figure) -> None:
        panels = figure.subplots(1, 2 if domains else 1, squeeze=False)[0]
        plots.draw_loss(panels[0], loss)
        if domains:
            plots.draw_validation(panels[1], domains, mean)

    plots.save_figure(folder / "training.png", (14 if domains else 8, 5.5), draw)
    missing = [] if domains else ["This run was not evaluated while it trained."]
    return ["## Training", *missing, "![training loss and validation bits per byte](training.png)"]


def _balance(folder: Path, records: list[dict[str, Any]], evaluation: Mapping[str, Any]) -> list[str]:
    found = {name: curve(records, f"load/{name}") for name in ("max_violation", "entropy", "dropped")}
    curves = {
        name: Curve(steps=values.steps, values=values.values.reshape(len(values.steps), -1))  # a lone layer is a number
        for name, values in found.items()
        if values is not None and values.values.size
    }
    if not curves:
        return ["## Load over time", "This run logged no load: its model has no MoE layer."]
    count = next(iter(curves.values())).values.shape[1]
    known = evaluation.get("load_layers", [])
    layers = known if len(known) == count else range(count)
    plots.save_figure(
        folder / "load.png", (11, 1 + 2.8 * len(curves)), lambda figure: plots.draw_balance(figure, curves, layers)
    )
    return ["## Load over time", "![load over time](load.png)"]


def _specialisation(folder: Path, evaluation: Mapping[str, Any]) -> list[str]:
    found, layers = loads(evaluation), _layers(evaluation)
    title = "## Specialisation"
    if not found:
        return [title, "No load by domain: this run has no final evaluation, or its model has no MoE layer."]
    plots.save_figure(
        folder / "routing.png",
        plots.heat_map_size(len(found), len(layers)),
        lambda figure: plots.draw_heat_maps(figure, found, layers, range(len(layers)), _ROUTING_TITLE),
    )
    header = ["layer", "max violation", "normalised entropy", "dead experts", "distance between domains"]
    keys = ["max_violation", "entropy", "dead", "domain_distance"]
    numbers = _layer_numbers(evaluation)
    rows = [[str(layer), *(_number(of.get(key)) for key in keys)] for layer, of in zip(layers, numbers, strict=True)]
    legend = (
        "Distance: the share of its assignments that a domain would have to move to use the experts as another domain "
        "does (total variation, mean over pairs): 0 = domains use the same experts, 1 = no expert in common. Dead: "
        "below 1 % of the even share. The other numbers are of the load over all domains, weighted by tokens."
    )
    top = {name: top_experts(load, _TOP_EXPERTS) for name, load in found.items()}
    favourites = [
        [str(layer), *(_favourites(found[name][index], top[name][index]) for name in found)]
        for index, layer in enumerate(layers)
    ]
    intro = "Most used experts, with load × number of experts (1 = even use):"
    image = "![expert by domain](routing.png)"
    return [title, image, _table(header, rows), legend, intro, _table(["layer", *found], favourites)]


def _config(workdir: Path) -> list[str]:
    config = _read_json(workdir / "config.json")
    if not config:
        return ["This run saved no `config.json`."]
    return [f"<details><summary>config.json</summary>\n\n```json\n{json.dumps(config, indent=1)}\n```\n\n</details>"]


def _loss(records: list[dict[str, Any]]) -> Curve | None:
    """The language-model loss alone where it is logged, since balance terms say nothing about the text."""
    alone = curve(records, "loss/lm")
    return curve(records, "loss") if alone is None else alone


def _favourites(load_E: Array, experts: Any) -> str:
    return ", ".join(f"{expert} ({load_E[expert] * len(load_E):.1f})" for expert in experts)


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))
