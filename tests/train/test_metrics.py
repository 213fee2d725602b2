"""What MetricWriter leaves on disk, after a clean run, after a kill and after a resume."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.train.metrics import MetricWriter, read_metrics


def steps_on_tensorboard(workdir: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(workdir / "tensorboard")).Reload().Scalars(tag)
    assert len({event.step for event in events}) == len(events), "a step is doubled"
    return {event.step: event.value for event in events}


def test_a_line_has_step_first_then_sorted_names(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {"tokens": 8, "loss": 2.5, "load/dead": [0, 1]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "load/dead": [0, 1], "loss": 2.5, "tokens": 8}\n'
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "load/dead": [0, 1], "loss": 2.5, "tokens": 8}]


def test_float32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**31, 1000).astype(np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {"all": values, "one": values[0], "zero_d": np.array(values[1])})
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert np.array(record["all"], np.float32).tobytes() == values.tobytes()
    assert struct.pack("f", record["one"]) == values[0].tobytes()
    assert struct.pack("f", record["zero_d"]) == values[1].tobytes()


def test_non_finite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {"a": math.nan, "b": np.float32(math.inf), "c": [-math.inf, 1.0]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": "nan", "b": "inf", "c": ["-inf", 1.0]}
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == [-math.inf, 1.0]


def test_tensorboard_reads_scalars_and_one_scalar_a_layer(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5 * step, "tokens": step, "load/dropped": [0.25, 0.5 * step]})
    assert steps_on_tensorboard(tmp_path, "loss") == {1: 0.5, 2: 1.0, 3: 1.5}
    assert steps_on_tensorboard(tmp_path, "tokens") == {1: 1, 2: 2, 3: 3}
    assert steps_on_tensorboard(tmp_path, "load/dropped/layer_0") == {1: 0.25, 2: 0.25, 3: 0.25}
    assert steps_on_tensorboard(tmp_path, "load/dropped/layer_1") == {1: 0.5, 2: 1.0, 3: 1.5}


def test_a_resume_neither_loses_nor_doubles_a_step(tmp_path: Path) -> None:
    want = {1: 1.0, 2: 2.0, 3: 3.0, 4: 304.0, 5: 405.0, 6: 406.0, 7: 407.0, 8: 408.0}
    with ExitStack() as at_end:
        # Three lives within a second, each over without a close after it wrote further than its last checkpoint.
        for restored, written in ((0, 5), (3, 6), (4, 8)):
            writer = MetricWriter(tmp_path, resume_step=restored)
            at_end.callback(writer.close)
            for step in range(restored + 1, written + 1):
                writer.write(step, {"loss": float(100 * restored + step)})
        records = read_metrics(tmp_path / "metrics.jsonl")
        assert [(record["step"], record["loss"]) for record in records] == list(want.items())
        assert steps_on_tensorboard(tmp_path, "loss") == want


@pytest.mark.parametrize("tail", ['{"step": 3, "los', '{"step": 3, "loss": 1', "{", "\x00\x00", '{"step": 3'])
def test_a_torn_last_line_is_dropped(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n'
    path.write_text(whole + tail)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    with MetricWriter(tmp_path, resume_step=5) as writer:
        writer.write(3, {"loss": 0.3})
    assert path.read_text() == whole + '{"step": 3, "loss": 0.3}\n'
    assert not list(tmp_path.glob("*.tmp"))


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    MetricWriter(tmp_path, resume_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "two"}', '{"step": 2, "loss": "what"}'])
def test_damage_before_the_last_line_is_an_error_and_nothing_is_cut(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics record"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        MetricWriter(tmp_path, resume_step=1)
    assert path.read_bytes() == before


def test_kill_9_loses_nothing_that_was_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from moe.train.metrics import MetricWriter\n"
        "writer = MetricWriter(Path(sys.argv[1]), resume_step=0)\n"
        "for step in range(1, 21): writer.write(step, {'loss': float(step)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    want = {step: float(step) for step in range(1, 21)}
    assert {record["step"]: record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")} == want
    assert steps_on_tensorboard(tmp_path, "loss") == want


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path, resume_step=1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(0, {"loss": 1.0})
        with pytest.raises(ValueError, match="step = 0: must be above 0"):
            writer.write(0, {"loss": 1.0})
        with pytest.raises(ValueError, match="argument of its own"):
            writer.write(1, {"step": 1.0})
        for value in ("text", None, [[1.0]], True, [1.0, None]):
            with pytest.raises(TypeError, match=r"metrics\['loss'\]"):
                writer.write(1, {"loss": value})
        writer.write(1, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_resumed_writer_refuses_a_step_it_already_has(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    with MetricWriter(tmp_path, resume_step=4) as writer, pytest.raises(ValueError, match="above 4"):
        writer.write(4, {"loss": 1.0})
