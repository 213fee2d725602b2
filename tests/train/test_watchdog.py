"""The watchdog on a clock that the test turns; its thread, its stacks and its end once each."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.config import ConfigError, check
from moe.train.watchdog import Watchdog, WatchdogConfig

CONFIG = WatchdogConfig(report_after_s=100, stop_after_s=300, stop_compiling_after_s=1000)


class Run:
    """A watchdog without its thread, whose clock goes on a second a look."""

    def __init__(self, path: Path, config: WatchdogConfig = CONFIG, stops: bool = True):
        self.now, self.stopped = 0.0, list[str]()
        self.stacks = path.open("w+")
        self.noted = list[str]()
        stop = (lambda: self.stopped.append("now")) if stops else None
        self.watchdog = Watchdog(config, stop, note=self.noted.append, stream=self.stacks, clock=lambda: self.now)
        self.doing = self.watchdog.doing

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.watchdog.look()

    def num_dumps(self) -> int:
        self.stacks.seek(0)
        return self.stacks.read().count("most recent call first")


@pytest.fixture
def run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    caplog.set_level(logging.WARNING)
    run = Run(tmp_path / "stacks")
    yield run
    run.stacks.close()


def test_a_stall_is_reported_once_with_what_how_long_and_the_stacks(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.doing("waiting for the batch of step 41")
    run.wait(99)
    assert not caplog.messages and not run.num_dumps()
    run.wait(150)
    assert caplog.messages == ["stalled: waiting for the batch of step 41 for 100 s"]
    run.stacks.seek(0)
    stacks = run.stacks.read()
    assert "test_watchdog.py" in stacks and "in look" in stacks
    dumps = run.num_dumps()
    run.doing("waiting for the numbers of step 40")
    run.wait(110)
    assert caplog.messages[1:] == ["stalled: waiting for the numbers of step 40 for 100 s"]
    assert run.num_dumps() == 2 * dumps and not run.stopped


def test_the_same_words_again_are_something_new(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(10):
        run.doing("the step")
        run.wait(90)
    assert not caplog.messages and not run.stopped


def test_it_stops_after_its_time(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.doing("saving step 5")
    run.wait(300)
    assert not run.stopped
    run.wait(1)
    assert run.stopped == ["now"] and run.noted == ["saving step 5"]
    assert caplog.messages[-1] == ("stalled: saving step 5 for 300 s; the process ends (watchdog.stop_after_s = 300)")


def test_compiling_has_a_time_of_its_own(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.doing("compiling step 1", compiling=True)
    run.wait(1000)
    assert caplog.messages == ["stalled: compiling step 1 for 100 s"] and not run.stopped
    run.wait(1)
    assert run.stopped == ["now"] and "stop_compiling_after_s = 1000" in caplog.text


def test_nothing_is_a_stall_before_the_first_word(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.wait(5000)
    assert not caplog.messages and not run.stopped


def test_time_in_which_the_process_was_stopped_does_not_count(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.doing("step 2")
    run.wait(10)
    run.now += 100_000
    run.wait(50)
    assert not caplog.messages and not run.stopped


@pytest.mark.parametrize(
    ("config", "stops", "reports"),
    [
        (WatchdogConfig(report_after_s=0, stop_after_s=300), True, 0),
        (WatchdogConfig(report_after_s=100, stop_after_s=0), True, 1),
        (WatchdogConfig(report_after_s=100, stop_after_s=300), False, 1),
    ],
    ids=["never reports", "never stops", "has nobody to stop"],
)
def test_what_is_not_asked_for_does_not_happen(
    tmp_path: Path, config: WatchdogConfig, stops: bool, reports: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "stacks", config, stops)
    run.doing("step 2")
    run.wait(299)
    assert len(caplog.messages) == reports and bool(run.num_dumps()) == bool(reports)
    run.wait(1000)
    assert bool(run.stopped) == (stops and config.stop_after_s > 0)
    run.stacks.close()


def test_the_thread_looks_on_by_itself_and_ends(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    stopped = threading.Event()
    config = WatchdogConfig(report_after_s=0.02, stop_after_s=0.1)
    with (tmp_path / "stacks").open("w+") as stacks:
        with Watchdog(config, stopped.set, stream=stacks) as watchdog:
            watchdog.doing("waiting for ever")
            assert stopped.wait(60)
        stacks.seek(0)
        assert "in wait" in stacks.read()
    assert "stalled: waiting for ever for 0 s; the process ends" in caplog.text
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_report_that_hangs_does_not_keep_the_process_from_its_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = threading.Event()
    monkeypatch.setattr("moe.train.watchdog._LAST_WORDS_S", 0.01)
    run = Run(tmp_path / "more", WatchdogConfig(report_after_s=0, stop_after_s=300))
    monkeypatch.setattr(run.watchdog, "_dump", never.wait)
    run.doing("step 2")
    run.wait(301)
    assert run.stopped == ["now"]
    never.set()
    run.stacks.close()


def test_a_limit_below_the_report_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stop_after_s = 60: must be at least report_after_s = 300, or 0"):
        check(WatchdogConfig(stop_after_s=60))
    check(WatchdogConfig(stop_after_s=0, stop_compiling_after_s=0))
