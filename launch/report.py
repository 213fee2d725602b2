"""Writes the report of a run: `python -m launch.report DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe.analysis.report import write_report
from moe.analysis.run_files import ReportError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write the report of a run.")
    parser.add_argument("workdir", type=Path, metavar="DIR", help="folder of the run, with its metrics.jsonl")
    try:
        print(write_report(parser.parse_args(arguments).workdir))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
