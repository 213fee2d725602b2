"""Break runs on purpose, at least a hundred times, and look whether they come back as they should:

    python -m tests.faults --workdir runs/faults --page docs/results/faults.md

Every run is started by `launch.submit local` as two processes. The same command goes on where it was interrupted.
Exit status 1 if a fault was not survived, or not with the documented message. Needs root for the full disk (a tmpfs);
without, that kind is left out, which the page says.
"""

import argparse
import random
import shlex
import sys
import time
from pathlib import Path

from tests.faults import by_hand, numbers, series
from tests.faults.journal import Journal
from tests.faults.kinds import KINDS, counts
from tests.faults.page import write_page
from tests.faults.series import Bench, Series
from tests.faults.verdicts import Fault

SERIES: dict[str, Series] = {
    "mixed": series.mixed,
    "stall": series.stall,
    "disk": by_hand.disk,
    "disk_one": by_hand.disk_one,
    "data": by_hand.data,
    "nan": numbers.nan,
    "nan_stop": numbers.nan_stop,
    "nan_again": numbers.nan_again,
    "nan_data": numbers.nan_data,
}


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="at least so many, over all kinds")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the campaign and its runs")
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these; several commands may share a workdir")
    given = parser.parse_args(words)
    wanted, skipped = counts(given.faults, given.kinds), {}
    if wanted.get("disk") and not by_hand.can_mount(given.workdir / "mount"):
        del wanted["disk"]
        skipped["disk"] = "a small disk can be mounted only by root"
    bench, journal = Bench(given.workdir.absolute()), Journal(given.workdir)
    bench.make_reference()
    campaign(bench, journal, wanted, given.seed)
    if given.page:
        write_page(
            given.page, journal.faults, skipped, shlex.join(["python", "-m", "tests.faults", *words]), bench.root
        )
    faults = journal.faults
    failed = [fault for fault in faults if fault.problems]
    print(f"{len(faults)} faults, {len(failed)} not survived as documented")
    return 1 if failed else 0


def campaign(bench: Bench, journal: Journal, wanted: dict[str, int], seed: int) -> None:
    """Injects what is wanted and not done yet, run after run."""
    while left := journal.left(wanted):
        group, faults = next(iter(left.items()))
        random.Random(seed).shuffle(faults)
        index = journal.begin()
        begin, injected = time.monotonic(), 0
        for fault in SERIES[group](bench, index, faults, random.Random(f"{seed} {index}")):
            journal.note(fault)
            injected += 1
            print(told(fault), flush=True)
        journal.close(index)
        if not injected:
            raise RuntimeError(f"run {index} ended before a fault could be injected")
        print(f"run {index} ({group}): {time.monotonic() - begin:.0f} s", flush=True)


def told(fault: Fault) -> str:
    """A line for a person who looks on."""
    went_on = "" if fault.resumed is None else f" went on at {fault.resumed}, lost {fault.lost} of {fault.allowed},"
    verdict = "; ".join(fault.problems) or "survived"
    return f"{fault.run:3} {fault.kind:13} {fault.target:40} at {fault.last},{went_on} {fault.seconds:.1f} s: {verdict}"


if __name__ == "__main__":
    sys.exit(main())
