import logging
import os
from pathlib import Path

import jax
import pytest

from moe.train import events
from moe.train.events import Events, read_events


def test_entries_come_back_in_order_across_starts(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    Events(tmp_path).write(events.STARTED, 0)
    again = Events(tmp_path)
    again.write(events.ROLLBACK, 40, failed=[45, 49])
    again.write("without a step")
    first, second, third = read_events(tmp_path)
    assert (first["event"], first["step"]) == (events.STARTED, 0) and first["time"].endswith("+00:00")
    assert second["failed"] == [45, 49] and "step" not in third


def test_a_torn_last_line_is_left_out_and_cut_away_at_the_next_start(tmp_path: Path) -> None:
    Events(tmp_path).write(events.STARTED, 0)
    whole = (tmp_path / events.NAME).read_bytes()
    (tmp_path / events.NAME).write_bytes(whole + whole[:20])
    assert len(read_events(tmp_path)) == 1
    Events(tmp_path).write(events.RESUMED, 5)
    assert [entry["event"] for entry in read_events(tmp_path)] == [events.STARTED, events.RESUMED]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    Events(tmp_path).write(events.STARTED, 0)
    whole = (tmp_path / events.NAME).read_bytes()
    (tmp_path / events.NAME).write_bytes(b"[1]\n" + whole)
    with pytest.raises(ValueError, match=r"events.jsonl:1: not an event: '\[1\]'"):
        read_events(tmp_path)


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Events(tmp_path).write(events.STARTED, 0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_warning_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    diary = Events(tmp_path)
    diary.write(events.STARTED, 0)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:7]))
    with caplog.at_level(logging.WARNING):
        diary.write(events.RESUMED, 5)
    assert "cannot note 'resumed' (only 7 of" in caplog.text
    monkeypatch.undo()
    diary.write(events.FINISHED, 9)
    assert [entry["event"] for entry in read_events(tmp_path)] == [events.STARTED, events.FINISHED]
    (tmp_path / events.NAME).unlink()
    (tmp_path / events.NAME).mkdir()
    diary.write(events.FINISHED, 9)
    assert "Is a directory" in caplog.text
