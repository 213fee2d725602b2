"""A table of finished runs: what each variant reached, how it balanced and what it cost, over seeds.

Every number comes from a run's own files (`summary.json`, `metrics.jsonl`). Balance numbers are means over the last
`TAIL` steps; a step's value for several layers is their mean. The step time is the 10th percentile over the run: other
work on a shared machine only ever adds to it.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TAIL = 50


class Row(NamedTuple):
    """One finished run."""

    bits_per_byte: float
    max_violation: float
    dead: float
    """Experts with less than 1 % of their share, summed over layers."""
    dropped: float
    step_s: float
    active: int
    total: int


COLUMNS = {
    "bits_per_byte": ("held-out bits/byte", "{:.3f}"),
    "max_violation": ("max violation", "{:.2f}"),
    "dead": ("dead experts", "{:.1f}"),
    "dropped": ("dropped", "{:.2%}"),
    "step_s": ("step, ms", "{:.0f}"),
    "active": ("parameters, active", "{:,}"),
    "total": ("total", "{:,}"),
}


def is_finished(workdir: Path) -> bool:
    """Whether the run was trained to its end and evaluated; its summary is the last thing it writes."""
    path = workdir / "summary.json"
    return path.is_file() and "mean_bits_per_byte" in json.loads(path.read_text())


def read_row(workdir: Path) -> Row:
    """The numbers of a finished run."""
    summary = json.loads((workdir / "summary.json").read_text())
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = sorted(record["time/step_s"] for record in records)
    return Row(
        bits_per_byte=summary["mean_bits_per_byte"],
        max_violation=_tail(records, "load/max_violation", statistics.fmean),
        dead=_tail(records, "load/dead", sum),
        dropped=_tail(records, "load/dropped", statistics.fmean),
        step_s=times[len(times) // 10],
        active=int(summary["parameters/active"]),
        total=int(summary["parameters/total"]),
    )


def _tail(records: Sequence[Mapping[str, Any]], name: str, over_layers: Any) -> float:
    """Mean over the last steps; a model without experts has none of these."""
    values = [over_layers(record[name]) for record in records[-TAIL:] if record.get(name)]
    return statistics.fmean(values) if values else float("nan")


def table(rows: Mapping[str, Sequence[Row]], notes: Mapping[str, str]) -> list[str]:
    """Markdown lines, best held-out bits per byte first: mean over seeds, and how far they spread where several ran.

    `notes` says in a few words what each variant is.
    """
    titles = [title for title, _ in COLUMNS.values()]
    lines = [f"| variant | {' | '.join(titles)} | seeds | what it is |"]
    lines.append("|---|" + "---:|" * (len(titles) + 1) + "---|")
    for name in sorted(rows, key=lambda name: statistics.fmean(row.bits_per_byte for row in rows[name])):
        cells = [_cell(column, [getattr(row, column) for row in rows[name]]) for column in COLUMNS]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {len(rows[name])} | {notes.get(name, '')} |")
    return lines


def _cell(column: str, values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if mean != mean:
        return "-"
    form = COLUMNS[column][1]
    if column == "step_s":
        return form.format(1000 * min(values))  # other work on the machine only ever adds
    if column in ("active", "total"):
        return form.format(int(mean))
    if len(values) > 1 and column == "bits_per_byte":
        return f"{form.format(mean)} ± {form.format((max(values) - min(values)) / 2)}"
    return form.format(mean)
