"""What `launch.plan` does once its words are read: search, compile what is asked for, print."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from launch import plan as command
from moe.config import ConfigError, at_least
from moe.folding import MeshConfig
from moe.plan.chips import Chip, chip
from moe.plan.cost import Assumptions
from moe.plan.search import Infeasible, Plan, Space, best, describe, judge, smallest
from moe.plan.workload import Workload
from moe.train.run import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Search the layouts of a config."""

    chips: int
    """Chips to use, all of them."""
    chip: str
    """Kind of chip: v4, v5e, v5p, v6e, tpu7x, h100, h200, b200."""
    top: int = 5
    """Layouts to print."""
    verify: int = 0
    """How many of them to compile ahead of time."""
    json: str | None = None
    """File for the numbers."""
    spare: float = 0.05
    """Share of a device's memory to leave free: what the compiler loses between buffers (1 to 5 % were seen)."""
    space: Space = Space()
    assume: Assumptions = Assumptions()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, chips=1, top=1, verify=0, spare=0)
        if self.verify > self.top:
            yield "verify", f"must be at most top = {self.top}"
        if not self.spare < 1:
            yield "spare", "must be less than 1"


def plan(run: RunConfig, arguments: Arguments, origin: dict[str, Any]) -> int:
    """Exit status: 0, or 1 if nothing fits."""
    kind = chip(arguments.chip)
    work = command.workload(run, arguments.chips * kind.devices)
    topology = command.topology_of(kind, arguments.chips) if arguments.verify else ""
    legal = functools.partial(command.legal, run)
    try:
        found = best(
            work, kind, legal, space=arguments.space, top=arguments.top, assume=arguments.assume, spare=arguments.spare
        )
    except Infeasible as error:
        more = smallest(work, kind, legal, space=arguments.space, spare=arguments.spare)
        hint = f"the smallest power of two that fits is {more} {kind.name}" if more else "16 times as many do not fit"
        print(f"error: {error}; {hint}", file=sys.stderr)
        return 1
    rows = [_row(str(number), one) for number, one in enumerate(found, 1)]
    if (own := _own(run, work, kind, arguments.assume)) is not None:
        rows.append(_row("config", own))
    for row, one in zip(rows[: arguments.verify], found, strict=False):
        row |= command.compiled(run, one, topology)
    numbers = origin | {"chips": arguments.chips, "chip": kind.name, "limit_bytes": kind.usable, "plans": rows}
    if arguments.json is not None:
        command.write(arguments.json, numbers)
    show(rows, kind)
    print(f"fastest: {command.words_of(found[0].work)}")
    return 0


def _own(run: RunConfig, work: Workload, kind: Chip, assume: Assumptions) -> Plan | None:
    """The layout that the config asks for; None if it is none on so many devices."""
    if run.mesh == MeshConfig():
        return None
    try:
        return judge(work, kind, assume) if command.legal(run, work) else None
    except ConfigError:
        return None


def _row(name: str, one: Plan) -> dict[str, Any]:
    return {
        "name": name,
        "layout": describe(one.work),
        "flags": command.words_of(one.work),
        "step_s": one.seconds,
        "mfu": one.mfu,
        "seconds": one.cost._asdict(),
        "predicted_bytes": one.memory.total,
        "bytes": one.memory.terms(),
    }


def show(rows: list[dict[str, Any]], kind: Chip) -> None:
    """One line for each layout; below, for each, the largest parts of its time and of its memory."""
    verified = any("compiled_bytes" in row for row in rows)
    table = Table("", "layout", "s/step", "MFU", "GB", *(["compiled GB"] if verified else []))
    for row in rows:
        cells = [row["name"], row["layout"], f"{row['step_s']:.2f}", f"{100 * row['mfu']:.1f} %"]
        cells.append(f"{row['predicted_bytes'] / 1e9:.1f}")
        table.add_row(*cells, *([_compared(row) if "compiled_bytes" in row else ""] if verified else []))
    Console().print(table)
    for row in rows:
        time, memory = _largest(row["seconds"], 1.0, " s"), _largest(row["bytes"], 1e9, " GB")
        print(f"{row['name']}: {time}; {memory}")
    print(f"{kind.name}: {kind.usable / 1e9:.1f} GB and {kind.flops / 1e12:.0f} TFLOP/s a device")


def _compared(row: dict[str, Any]) -> str:
    refused = ", does not fit" if row["refused"] else ""
    return f"{row['compiled_bytes'] / 1e9:.1f} (predicted {100 * (row['predicted_over_compiled'] - 1):+.1f} %{refused})"


def _largest(parts: dict[str, float], unit: float, suffix: str) -> str:
    """The three largest parts."""
    most = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {size / unit:.2f}{suffix}" for name, size in most if size > 0)
