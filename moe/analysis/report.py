"""The report of a run: plots and `report.md` in `workdir/report`, and the flat numbers of `workdir/summary.json`.

Reads raw files only (`metrics.jsonl`, `evaluation.json`, `pairs.npz`, `config.json`, `run.json`), so a report can be
written on any machine, for a run of any version, without the model. What a run does not have is left out and said so.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis import report_history, report_routing
from moe.analysis.markdown import number, table
from moe.analysis.plots import save_figure
from moe.analysis.plots_routing import BASELINES, draw_bars, draw_overview
from moe.analysis.report_history import loss_curve
from moe.analysis.report_routing import layer_numbers
from moe.analysis.run_files import RunFiles, curve, read_json, read_run

_PICTURES = ("overview.png", "baselines.png", *report_history.PICTURES, *report_routing.PICTURES)


def write_report(workdir: Path) -> Path:
    """Writes `report/*.png`, `report/report.md` and `summary.json` of the run in `workdir`; returns the Markdown file.

    `summary.json` keeps the entries it already had, and overwrites those of the same name.

    Raises: ReportError where the folder or its metrics are missing or cannot be read.
    """
    run = read_run(workdir)
    summary = read_json(workdir / "summary.json") | _summary(run)
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    for name in _PICTURES:  # one that this report leaves out must not survive from the report before
        (folder / name).unlink(missing_ok=True)
    parts = [
        "# Report",
        _facts(summary),
        *_overview(folder, run),
        *_setup(run),
        *_compression(folder, run),
        *report_history.events(run),
        *report_history.training(folder, run),
        *report_history.load_over_time(folder, run),
        *report_routing.specialisation(folder, run),
        *report_routing.choices(folder, run),
        *_config(run),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    partial = workdir / "summary.json.partial"  # whole or not at all: it says that the run is finished
    partial.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    partial.replace(workdir / "summary.json")
    return path


def _summary(run: RunFiles) -> dict[str, float | str]:
    """Flat numbers: `bits_per_byte/<domain>`, `load/domain_distance/layer_3`, ...; a number a run lacks has no entry.

    As in the metrics, a loss that is not finite becomes a string, since JSON has no word for it.
    """
    last, evaluation = run.records[-1], run.evaluation
    summary: dict[str, Any] = {"steps": last["step"]}
    summary |= {key: last[key] for key in ("tokens", "loss", "loss/lm") if key in last}
    speed = curve(run.records, "time/tokens_per_s")
    if speed is not None:
        summary["time/tokens_per_s"] = float(np.median(speed.values))
    summary |= {key: evaluation[key] for key in ("seconds", "seed", "mean_bits_per_byte") if key in evaluation}
    if "step" in evaluation:
        summary["evaluation_step"] = evaluation["step"]
    summary |= {f"parameters/{kind}": count for kind, count in evaluation.get("parameters", {}).items()}
    for name, domain in evaluation.get("domains", {}).items():
        for key in ("bits_per_byte", *BASELINES):
            if domain.get(key) is not None:
                summary[f"{key}/{name}"] = domain[key]
    for layer, numbers in zip(run.layers, layer_numbers(run), strict=True):
        summary |= {f"load/{key}/layer_{layer}": value for key, value in numbers.items()}
    return {key: value if np.isfinite(value) else str(value) for key, value in summary.items()}


def _facts(summary: dict[str, Any]) -> str:
    names = {
        "steps": "steps",
        "tokens": "training tokens, padding included",
        "seconds": "time (s)",
        "time/tokens_per_s": "speed (tokens/s, median)",
        "parameters/total": "parameters",
        "parameters/active": "active parameters a token",
        "seed": "seed",
        "loss/lm": "last training loss (nats per token)",
        "evaluation_step": "evaluated after step",
        "mean_bits_per_byte": "held-out bits per byte, mean over domains",
    }
    rows = [[label, number(summary[key])] for key, label in names.items() if key in summary]
    return table(["", "this run"], rows)


def _overview(folder: Path, run: RunFiles) -> list[str]:
    loss, domains = loss_curve(run.records), run.evaluation.get("domains", {})
    if loss is None or not domains:
        return []
    save_figure(
        folder / "overview.png",
        (16, 9),
        lambda figure: draw_overview(figure, domains, run.loads, run.layers, loss),
    )
    return ["![routing, bits per byte and loss at a glance](overview.png)"]


def _setup(run: RunFiles) -> list[str]:
    """Routers by their config's type, whatever it is, and what the balance rules did."""
    routers = dict.fromkeys(_routers(run.config))
    rows = [["router", router] for router in routers]
    rows += [[f"balance rule {name}", str(what)] for name, what in run.start.get("balance", {}).items()]
    return ["## Routing and balance", table(["", "this run"], rows)] if rows else []


def _routers(config: Any) -> Iterator[str]:
    """Type and numbers of every config that stands under the name `router`, first to last."""
    if isinstance(config, list):
        for item in config:
            yield from _routers(item)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key == "router" and isinstance(value, dict) and "type" in value:
                plain = {knob: item for knob, item in value.items() if isinstance(item, (int, float, str))}
                knobs = [f"{knob} {item}" for knob, item in plain.items() if knob != "type"]
                yield ", ".join([f"`{value['type']}`", *knobs])
            yield from _routers(value)


def _compression(folder: Path, run: RunFiles) -> list[str]:
    evaluation = run.evaluation
    domains = evaluation.get("domains", {})
    if not domains:
        return ["## Bits per byte", "This run has no final evaluation (`evaluation.json`) yet."]
    rows = [
        [name, *(number(domain.get(key)) for key in ("bytes", "bits_per_byte", *BASELINES))]
        for name, domain in domains.items()
    ]
    if evaluation.get("mean_bits_per_byte") is not None:
        means = [_mean([domain.get(key) for domain in domains.values()]) for key in BASELINES]
        rows.append(["**mean**", "", number(evaluation["mean_bits_per_byte"]), *map(number, means)])
    save_figure(folder / "baselines.png", (11, 5.5), lambda figure: draw_bars(figure.subplots(), domains))
    note = "The baselines adapt to the very bytes they are scored on; the model has never seen them."
    header = ["domain", "held-out bytes", "bits per byte", *BASELINES.values()]
    return ["## Bits per byte", table(header, rows), note, "![bits per byte by domain](baselines.png)"]


def _config(run: RunFiles) -> list[str]:
    if not run.config:
        return ["This run saved no `config.json`."]
    return [
        f"<details><summary>config.json</summary>\n\n```json\n{json.dumps(run.config, indent=1)}\n```\n\n</details>"
    ]


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None
