"""The report of a run, or of several together:  python -m launch.report DIR...

python -m launch.report runs/quickstart                              plots and report.md in DIR/report
python -m launch.report runs/routers --baseline top_k                a sweep: means over seeds, pairs, equal FLOPs
python -m launch.report runs/a runs/b runs/c --out runs/abc          any run folders; those that differ only in
                                                                     their seed are one variant
python -m launch.report runs/routers --out docs/results/routers.md   the page there, the rest in docs/results/routers
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moe.analysis.report import write_report
from moe.analysis.run_files import ReportError


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run, sweep, or folder that holds runs")
    parser.add_argument("--baseline", help="variant that the others are compared with; a sweep names its own")
    parser.add_argument("--metric", help="what is compared: a name in summary.json or metrics.jsonl; lower is better")
    parser.add_argument("--out", type=Path, help="folder, or page.md, for the report; DIR/report if not given")
    parser.add_argument("--remark", default="", help="a sentence for the end of the page")
    given = parser.parse_args(words)
    try:
        print(_write(given, words))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(given: argparse.Namespace, words: Sequence[str]) -> Path:
    from moe.analysis.report_sweep import METRIC, write_sweep_report
    from moe.analysis.sweep_runs import is_run, read_runs

    folders: list[Path] = given.folders
    if len(folders) == 1 and (is_run(folders[0]) or not folders[0].is_dir()):
        for name in ("baseline", "metric", "out", "remark"):
            if getattr(given, name):
                raise ReportError(
                    f"{name} = {str(getattr(given, name))!r}: is for several runs, and {folders[0]} is one"
                )
        return write_report(folders[0])
    if given.out is None and len(folders) > 1:
        raise ReportError(f"out: is missing; with {len(folders)} folders --out says where the report goes")
    out: Path = given.out or folders[0] / "report"
    page, folder = (out, out.with_suffix("")) if out.suffix == ".md" else (out / "report.md", out)
    runs = read_runs(folders)
    return write_sweep_report(
        runs,
        page,
        folder,
        baseline=given.baseline,
        metric=given.metric or METRIC,
        written=_written(words),
        remark=given.remark,
    )


def _written(words: Sequence[str]) -> str:
    import jax

    return (
        f"Written by `python -m launch.report {shlex.join(words)}` on {datetime.date.today()}, {os.cpu_count()} CPU"
        f" cores ({platform.machine()}), Python {platform.python_version()}, jax {jax.__version__}."
    )


if __name__ == "__main__":
    sys.exit(main())
