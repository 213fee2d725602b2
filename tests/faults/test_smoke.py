"""A few faults of the campaign into one short run, and whether the campaign would see that something went wrong."""

import dataclasses
import random
import re
from pathlib import Path

import pytest

from launch import exits
from tests.faults.injecting import ready, same_so_far, strike
from tests.faults.journal import Journal
from tests.faults.kinds import KINDS, counts
from tests.faults.page import write_page
from tests.faults.running import CONFIG, started
from tests.faults.series import Bench, to_the_end
from tests.faults.verdicts import Fault, judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both runs find the same text, prepared once."""
    return tmp_path_factory.mktemp("faults")


def test_a_run_survives_a_kill_with_a_damaged_checkpoint(folder: Path) -> None:
    bench = Bench(folder, steps=30, size=1, submitted=False)
    bench.make_reference()
    run = bench.run("run")
    with started(run):
        assert ready(run)
        fault = strike(run, "flip", 0, random.Random(0), bench.reference, files="data/metadata")
        to_the_end(run, bench, fault)
        assert not fault.problems and fault.damaged
    tampered = [record | {"loss": 0.0} if record["step"] == 12 else record for record in bench.reference]
    assert same_so_far(run, bench.reference) and not same_so_far(run, tampered)
    assert not same_so_far(run, [*bench.reference[:20], *bench.reference[21:]])


def test_a_disk_that_one_of_two_processes_finds_full_ends_both(folder: Path) -> None:
    inner = {"refuse": [1, 10], "happened": str(folder / "refused")}
    bench = Bench(folder, steps=30, submitted=False)
    with started(bench.run("refused-run", config=f"{CONFIG}:inner", inner=inner)) as run:
        run.wait("the command to end", lambda: run.status is not None, ends=True)
        assert run.status == exits.STORAGE and (folder / "refused").exists()
        assert re.search(KINDS["disk_one"].message, run.said())
        assert run.complete() == [5] and run.last_step() <= 15


SURVIVED = Fault(
    kind="flip", run=0, number=0, target="20/data/metadata", last=22, complete=[10, 15, 20], resumed=15, damaged=[20],
    said=["supervisor: process 0 ended with status 137; 0.3 s until start 1 of at most 5"], equal=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"resumed": 20, "damaged": []}, None),
        ({"resumed": 20}, "its newest good checkpoint was 15"),
        ({"resumed": 10}, "its newest good checkpoint was 15"),
        ({"resumed": None}, "did not go on"),
        ({"equal": False}, "its curve is not"),
        ({"last": 31}, "lost 16 steps, 15 are allowed"),
        ({"last": 27, "resumed": 20, "damaged": []}, None),
        ({"last": 31, "resumed": 20, "damaged": []}, "lost 11 steps, 10 are allowed"),
        ({"said": []}, "did not say"),
        ({"kind": "kill"}, "which nobody had touched"),
        ({"kind": "kill_saving", "damaged": [], "resumed": 20}, "no save was under way"),
        ({"kind": "sigterm", "damaged": [], "resumed": 20}, "lost 2 steps, 0 are allowed"),
        ({"kind": "sigstop", "damaged": [], "resumed": 20, "ended_s": 99.0}, "99.0 s to end"),
        ({"kind": "disk", "damaged": [], "resumed": 20, "status": 1}, "ended with status 1, not 74"),
    ],
)
def test_the_verdict_sees_what_is_not_as_documented(changes: dict[str, object], problem: str | None) -> None:
    problems = judge(dataclasses.replace(SURVIVED, problems=[], **changes)).problems  # type: ignore[arg-type]
    assert problem is None if not problems else problem is not None and problem in "; ".join(problems)


def test_a_campaign_of_a_hundred_has_a_hundred_and_goes_on_where_it_was(tmp_path: Path) -> None:
    wanted = counts(100)
    assert sum(wanted.values()) >= 100 and set(wanted) == set(KINDS)
    journal = Journal(tmp_path)
    first, second = journal.begin(), journal.begin()
    journal.note(dataclasses.replace(SURVIVED, run=first))
    journal.note(dataclasses.replace(SURVIVED, run=second))
    journal.close(first)
    again = Journal(tmp_path)
    assert [fault.run for fault in again.faults] == [first]
    assert again.begin() not in (first, second)
    left = [kind for faults in again.left(wanted).values() for _, kind in faults]
    assert left.count("flip") == wanted["flip"] - 1 and len(left) == sum(wanted.values()) - 1


def test_the_page_names_what_fell_short(tmp_path: Path) -> None:
    bad = judge(dataclasses.replace(SURVIVED, number=1, equal=False, problems=[]))
    write_page(tmp_path / "page.md", [SURVIVED, bad], {"disk": "no root"}, "the command", tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "2 faults were injected, 1 survived" in page and f"| {KINDS['flip'].what} | 2 | 1 |" in page
    assert "its curve is not that of the reference run" in page and "Left out: the disk is full (no root)" in page
