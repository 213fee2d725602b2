"""The progress line on a terminal and off it; the clock is handed in, so nothing here waits."""

import io
import re
from collections.abc import Iterator

import pytest

from moe.train.progress import Progress, _duration, _si


class Clock:
    """Stands still until it is told the time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm-256color")
    yield


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_the_line_says_everything_once_and_in_units() -> None:
    stream, clock = io.StringIO(), Clock()
    metrics = {"loss": 2.34567, "time/tokens_per_s": 123456.0, "time/flops_per_s": 3.21e14, "time/mfu": 0.4125}
    metrics |= {"load/max_violation": [0.25, 0.75], "load/dropped": [0.0, 0.05], "skipped_total": 2}
    with Progress(100, 10, stream, every_steps=1, clock=clock) as progress:
        progress.update(11, {"loss": 3.0, "eval/bits_per_byte": 1.5})
        clock.now = 20.0
        progress.update(21, metrics)
    assert lines(stream)[0] == "11/100  loss 3.0000  val 1.5000 bits/byte"
    # 20 s for 10 steps, 79 steps left: 158 s. Dropped: (0 + 5 %) / 2. The validation of step 11 stays.
    assert lines(stream)[1:] == [
        "21/100  loss 2.3457  skipped 2  val 1.5000 bits/byte  123 ktok/s  321 TFLOP/s  MFU 41.2%  2m38s left  "
        "imbalance 0.75  dropped 2.50%"
    ]


def test_scalars_stand_for_one_layer_and_nothing_skipped_is_not_said() -> None:
    stream = io.StringIO()
    with Progress(5, 0, stream) as progress:
        progress.update(1, {"loss": float("nan"), "load/max_violation": 0.5, "load/dropped": 0.0, "skipped_total": 0})
    assert lines(stream) == ["1/5  loss nan  imbalance 0.50  dropped 0.00%"]


def test_off_a_terminal_a_line_at_most_every_ten_seconds_and_the_last_step_once() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(40, 0, stream, clock=clock) as progress:
        for step in range(1, 41):
            clock.now = float(step)
            progress.update(step, {})
    assert [line.split("/")[0] for line in lines(stream)] == ["1", "11", "21", "31", "40"]


def test_off_a_terminal_a_line_every_so_many_steps() -> None:
    stream = io.StringIO()
    with Progress(10, 4, stream, every_steps=3, clock=Clock()) as progress:
        for step in range(5, 11):
            progress.update(step, {})
    assert [line.split("/")[0] for line in lines(stream)] == ["5", "8", "10"]


def test_what_was_last_seen_is_printed_when_the_run_dies() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(10, 0, stream, clock=Clock()) as progress:
        progress.update(1, {"loss": 1.0})
        progress.update(2, {"loss": 9.0})
        raise RuntimeError
    assert lines(stream) == ["1/10  loss 1.0000", "2/10  loss 9.0000  0s left"]  # no time passed


def test_a_run_with_nothing_to_do_prints_nothing() -> None:
    stream = io.StringIO()
    with Progress(10, 10, stream):
        pass
    assert stream.getvalue() == ""


def test_a_note_is_a_line_of_its_own() -> None:
    stream = io.StringIO()
    with Progress(10, 0, stream, clock=Clock()) as progress:
        progress.note("checkpoint [step 1]")
        progress.update(1, {})
    assert lines(stream) == ["checkpoint [step 1]", "1/10"]


@pytest.mark.usefixtures("wide")
def test_on_a_terminal_one_line_is_redrawn_and_notes_stay_above() -> None:
    stream = Terminal()
    with Progress(10, 0, stream, clock=Clock()) as progress:
        progress.update(1, {"loss": 3.0})
        progress.note("saved [bold]step 1")
        progress.update(10, {"loss": 2.0, "eval/bits_per_byte": 1.25})
    text = stream.getvalue()
    assert "saved [bold]step 1" in text  # a note is text, not markup
    assert text.rindex("10/10  loss 2.0000  val 1.2500 bits/byte") > text.index("saved")
    assert "\x1b[2K" in text  # the line is erased and drawn again


def test_a_narrow_terminal_cuts_the_line_and_never_wraps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Progress(10, 0, stream, clock=Clock()) as progress:
        progress.update(10, {"loss": 2.0, "time/tokens_per_s": 5e5, "load/max_violation": [0.1] * 4})
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in lines(stream)]
    assert any(line.rstrip().endswith("…") for line in drawn)
    assert max(len(line) for line in drawn) <= 40


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0, "0 "),
        (0.5, "0.5 "),
        (999, "999 "),
        (999.9, "1 k"),
        (1000, "1 k"),
        (1234567, "1.23 M"),
        (9.89e14, "989 T"),
        (3e21, "3000 E"),
        (float("nan"), "nan "),
    ],
)
def test_si(value: float, want: str) -> None:
    assert _si(value) == want


@pytest.mark.parametrize(
    ("seconds", "want"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273600, "3d04h"), (-1, "0s")],
)
def test_duration(seconds: float, want: str) -> None:
    assert _duration(seconds) == want
