"""Evaluate a run on its held-out text:  python -m launch.evaluate WORKDIR [--report] [--step N] [--against N]

Writes WORKDIR/evaluation.json and prints a table. With --report it looks at every token's choice of experts too (pairs
of experts, agreement with an earlier checkpoint) and draws everything into WORKDIR/report.
"""

import dataclasses
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.cli import one_line_errors, parse
from moe.analysis.evaluation import evaluate_run
from moe.analysis.report import write_report
from moe.config import ConfigError

PROGRAM = "python -m launch.evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a run on its held-out text."""

    workdir: str
    """The run's folder; may stand first, without the flag."""
    report: bool = False
    """Study single tokens' choices of experts and write the report; the bare flag means True."""
    step: int | None = None
    """Checkpoint to evaluate; the newest if not given."""
    against: int | None = None
    """Checkpoint to compare the routing with, for --report; the newest one before if not given."""
    max_bytes: int | None = None
    """Held-out bytes per domain; evaluate.final_max_bytes of the run's config if not given."""


def main(words: list[str] | None = None) -> int:
    with one_line_errors():
        arguments = parse(Arguments, _spelled_out(sys.argv[1:] if words is None else words), PROGRAM)
        if arguments.against is not None and not arguments.report:
            raise ConfigError(f"against = {arguments.against}: is ignored without --report")
        workdir = Path(arguments.workdir)
        found = evaluate_run(
            workdir, step=arguments.step, max_bytes=arguments.max_bytes, study=arguments.report,
            against=arguments.against,
        )  # fmt: skip
        table = Table("domain", *(name + " bits/byte" for name in ("model", "unigram", "gzip", "xz")), "bytes")
        for name, row in found["domains"].items():
            numbers = (f"{row[key]:.3f}" for key in ("bits_per_byte", "unigram", "gzip", "xz"))
            table.add_row(name, *numbers, f"{row['bytes']:,}")
        Console().print(table)
        print(f"step {found['step']}: mean {found['mean_bits_per_byte']:.4f} bits per byte")
        if arguments.report:
            print(f"report: {write_report(workdir)}")
    return 0


def _spelled_out(words: list[str]) -> list[str]:
    """`WORKDIR --report` as `--workdir WORKDIR --report True`."""
    words = ["--workdir", *words] if words and not words[0].startswith("-") else list(words)
    return [
        part
        for word, following in zip(words, [*words[1:], "--"], strict=True)
        for part in ((word, "True") if word == "--report" and following.startswith("-") else (word,))
    ]


if __name__ == "__main__":
    sys.exit(main())
