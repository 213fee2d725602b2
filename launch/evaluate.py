"""Evaluate a run on its held-out text:  python -m launch.evaluate --workdir DIR [--step N] [--max-bytes N]

Writes DIR/evaluation.json and the report; prints a table.
"""

import dataclasses
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.cli import one_line_errors, parse
from moe.analysis.evaluation import evaluate_run
from moe.analysis.report import write_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a run on its held-out text."""

    workdir: str
    """The run's folder."""
    step: int | None = None
    """Checkpoint to evaluate; the newest if not given."""
    max_bytes: int | None = None
    """Held-out bytes per domain; evaluate.final_max_bytes of the run's config if not given."""


def main(words: list[str] | None = None) -> int:
    with one_line_errors():
        arguments = parse(Arguments, words, "python -m launch.evaluate")
        workdir = Path(arguments.workdir)
        found = evaluate_run(workdir, step=arguments.step, max_bytes=arguments.max_bytes)
        table = Table("domain", *(name + " bits/byte" for name in ("model", "unigram", "gzip", "xz")), "bytes")
        for name, row in found["domains"].items():
            numbers = (f"{row[key]:.3f}" for key in ("bits_per_byte", "unigram", "gzip", "xz"))
            table.add_row(name, *numbers, f"{row['bytes']:,}")
        Console().print(table)
        print(f"step {found['step']}: mean {found['mean_bits_per_byte']:.4f} bits per byte")
        print(f"report: {write_report(workdir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
