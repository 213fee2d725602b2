"""Runs whose loss is not a number on chosen steps of the data: back, on with other data, and the same curve as without.

A token that the text does not have makes the loss NaN; the loader puts it where a test wants it. All runs share one
compiled step.
"""

import dataclasses
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe.config import ConfigError, check
from moe.data import DataConfig, FolderConfig
from moe.data import loader as loading
from moe.layers.attention import AttentionConfig
from moe.models import DecoderConfig
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.train import events, loss, session, steps
from moe.train.checkpoint import Checkpoints
from moe.train.evaluate import Evaluator
from moe.train.failures import NotFinite, StorageError
from moe.train.loop import Outcome
from moe.train.metrics import read_metrics
from moe.train.record import Recorder
from moe.train.run import CheckpointConfig, EvaluateConfig, RollbackConfig, RunConfig
from moe.train.storage import CHECKPOINTS, whole_steps
from moe.train.watchdog import Watchdog
from tests.launch.runs import write_text
from tests.train.poisoned import POISON, Case

STEPS = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("rollback")
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_width=8)
    return RunConfig(
        steps=STEPS,
        batch_size=2,
        max_skipped=2,
        model=DecoderConfig(vocab_size=264, width=16, num_layers=1, moe=None, mlp_hidden=16, attention=attention),
        balance=(),
        data=DataConfig(
            source=FolderConfig(path=str(write_text(root / "text"))), seq_len=16, cache_dir=str(root / "cache"),
            num_threads=0, prefetch=0,
        ),
        optim=AdamWConfig(schedule=WarmupCosineConfig(warmup_steps=2)),
        checkpoint=CheckpointConfig(every=4, keep_best=0, keep_last=3),
        evaluate=EvaluateConfig(every=0),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    """Every run takes the step and the state at step 0 that the first one compiled; the poison is in the data alone."""
    made: list[Any] = []
    first: list[Any] = []
    jit_step, nats, create_state = steps.jit_step, loss.nats, session.create_state

    def once(*args: Any) -> Any:
        if not made:
            made.append(jit_step(*args))
        return made[0]

    def poisoned(model: Any, params: Any, hidden: Any, target: Any, real: Any) -> Any:
        return jnp.where((target == POISON).any(), jnp.nan, nats(model, params, hidden, target, real))

    def start(*args: Any) -> Any:
        if not first:
            first.append(create_state(*args))
        return jax.tree.map(jnp.copy, first[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "jit_step", once)
        patch.setattr(session, "create_state", start)
        patch.setattr(loss, "nats", poisoned)
        patch.setattr(session, "in_mesh_order", lambda config, devices: devices[:1])
        yield


@pytest.fixture
def make(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Case]:
    real = loading._Steps.__getitem__
    current: list[Case] = []
    monkeypatch.setattr(loading._Steps, "__getitem__", lambda self, step: current[-1].item(real, self, step))

    def case(name: str) -> Case:
        current.append(Case(base, tmp_path / name))
        return current[-1]

    return case


def test_with_skip_data_the_curve_is_that_of_a_run_without_the_window(make: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    reference = make("reference")
    reference.left_out = lambda step: step if step <= 8 else step + 3
    assert reference.run() == Outcome(STEPS, True)

    case = make("poisoned")
    case.poisoned = {10, 11}  # steps 9, 10 and 11 are skipped: from the checkpoint of step 8 on
    assert case.run(times=1, skip_data=True) == Outcome(STEPS, True)
    assert case.curve() == reference.curve() and len(case.curve()) == STEPS
    assert case.column("data_step") == [*range(1, 9), *range(12, 20)]
    assert case.column("rollbacks") == [0] * 8 + [1] * 8
    assert "rollback 1 of 1: from step 11 back to step 8; steps 9 to 11 of the data are skipped" in caplog.text
    assert case.events() == [
        {"event": events.STARTED, "step": 0},
        {"event": events.ROLLBACK, "step": 11, "to": 8, "rollbacks": 1, "data": [9, 11], "data_skipped": True},
        {"event": events.FINISHED, "step": 16},
    ]
    assert "rollbacks" not in read_metrics(reference.workdir / "metrics.jsonl")[-1]


def test_the_window_stays_skipped_and_the_count_stays_over_restarts(make: Any) -> None:
    reference = make("reference")
    reference.left_out = lambda step: step if step <= 4 else step + 4 if step <= 8 else step + 6
    reference.run()

    case = make("poisoned")
    case.poisoned = {7, 8, 13, 14}
    outcome = case.run(times=2, skip_data=True, should_stop=stop_after(9))
    assert outcome == Outcome(6, False)
    assert [entry["event"] for entry in case.events()][-1] == events.PREEMPTED
    assert case.saved()[6] | {"fingerprint": ""} == {
        "next_step": 10, "seed": 0, "sequences_per_step": 2, "fingerprint": "", "rollbacks": 1, "skipped_in_row": 0
    }  # fmt: skip
    with pytest.raises(NotFinite, match=r"step 10: .* in 2 updates in a row .*; rollback.times = 1 are used up"):
        case.run(times=1, skip_data=True)
    # The run may be given more: the second window goes back to the checkpoint of step 8.
    assert case.run(times=2, skip_data=True) == Outcome(STEPS, True)
    assert case.column("data_step") == [1, 2, 3, 4, 9, 10, 11, 12, *range(15, 23)]
    assert case.curve() == reference.curve()


def stop_after(calls: int) -> Callable[[], bool]:
    left = [calls]

    def should_stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return should_stop


def test_without_skip_data_the_same_data_are_read_again(make: Any, caplog: Any) -> None:
    reference = make("reference")
    reference.run()
    case = make("transient")
    case.times = {6: 1, 7: 1}
    assert case.run(times=1) == Outcome(STEPS, True)
    assert case.curve() == reference.curve()
    assert case.column("data_step") == list(range(1, STEPS + 1))
    assert "from step 7 back to step 4; steps 5 to 7 of the data are read again" in caplog.text

    stays = make("stays")
    stays.poisoned = {6, 7}
    with pytest.raises(NotFinite, match=r"step 7: .*; rollback.times = 2 are used up"):
        stays.run(times=2)
    assert [entry["to"] for entry in stays.events() if entry["event"] == events.ROLLBACK] == [4, 4]


def test_without_a_checkpoint_it_goes_back_to_the_start(make: Any) -> None:
    reference = make("reference")
    reference.left_out = lambda step: step + 3
    reference.run()
    case = make("poisoned")
    case.poisoned = {2, 3}
    assert case.run(times=1, skip_data=True) == Outcome(STEPS, True)
    assert case.curve() == reference.curve() and case.events()[1]["to"] == 0


def test_nothing_is_saved_within_the_trouble_unless_it_must_and_that_is_gone_past(make: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    case = make("poisoned")
    case.poisoned = {8, 9}
    assert case.run(times=1, skip_data=True, should_stop=stop_after(7)) == Outcome(8, False)
    assert case.saved()[8]["skipped_in_row"] == 1, "asked to end: saved all the same"
    assert case.run(times=1, skip_data=True) == Outcome(STEPS, True)
    assert "checkpoint 8 was saved after a skipped update and is deleted" in caplog.text
    assert case.column("data_step") == [1, 2, 3, 4, *range(10, 22)]
    assert case.saved()[8]["skipped_in_row"] == 0

    caplog.clear()
    whole = make("whole")
    whole.poisoned = {8, 9}
    whole.run(times=1, skip_data=True)
    assert "step 8 is not saved: its update was skipped" in caplog.text and whole.curve() == case.curve()


def test_with_nothing_good_to_go_back_to_it_ends_and_deletes_nothing(make: Any) -> None:
    case = make("poisoned")
    case.poisoned = {2, 3}
    assert case.run(times=1, should_stop=stop_after(1)) == Outcome(2, False)
    with pytest.raises(NotFinite, match=r"step 3: .*; every checkpoint is from within the trouble"):
        case.run(times=1)
    assert list(case.saved()) == [2]


def test_a_damaged_checkpoint_is_gone_past(make: Any) -> None:
    case = make("poisoned")
    case.poisoned = {10, 11}
    seen: list[int] = []

    def harm() -> bool:  # asked after every step
        seen.append(1)
        if len(seen) == 10:
            while 8 not in whole_steps(case.workdir):
                time.sleep(0.01)
            (case.workdir / CHECKPOINTS / "8" / "data" / "metadata").write_text("[")
        return False

    assert case.run(times=1, skip_data=True, should_stop=harm) == Outcome(STEPS, True)
    assert [(entry["event"], entry["step"]) for entry in case.events()][1:3] == [
        (events.DAMAGED, 8),
        (events.ROLLBACK, 11),
    ]
    assert case.column("data_step") == [1, 2, 3, 4, *range(12, 24)]


def test_without_rollback_the_run_ends_as_it_always_did(make: Any) -> None:
    case = make("poisoned")
    case.poisoned = {6, 7}
    with pytest.raises(NotFinite, match=r"^step 7: loss or gradient .* last good step$") as error:
        case.run()
    assert error.value.step == 7 and case.column("skipped_in_row")[-2:] == [1, 2]


def test_the_watchdog_is_told_what_goes_on(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled input pipeline, a step, its numbers and a save each have words of their own while they last."""
    said, begun = [""], dict[str, str]()
    doing = Watchdog.doing

    def listen(self: Watchdog, what: str, *, compiling: bool = False) -> None:
        said.append(what + " (compiling)" * compiling)
        doing(self, what, compiling=compiling)

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def spying(*args: Any, **more: Any) -> Any:
            begun.setdefault(name, said[-1])
            return real(*args, **more)

        monkeypatch.setattr(owner, name, spying)

    monkeypatch.setattr(Watchdog, "doing", listen)
    for owner, name in (
        (loading._Steps, "__getitem__"), (Recorder, "read"), (Checkpoints, "restore_newest"), (Checkpoints, "save"),
        (steps.Steps, "_compile"), (Checkpoints, "close"), (Evaluator, "_domain"),
    ):  # fmt: skip
        spy(owner, name)
    case = make("run")
    case.config = dataclasses.replace(case.config, evaluate=EvaluateConfig(every=8, max_bytes=1024))
    case.run()
    assert begun == {
        "restore_newest": "reading the newest checkpoint",
        "__getitem__": "waiting for the batch of step 1",
        "_compile": "compiling step 1 (compiling)",
        "read": "waiting for the numbers of step 1",
        "save": "saving step 4",
        "_domain": "evaluating 'colours' after step 8 (compiling)",
        "close": "finishing the last save",
    }
    assert "evaluating 'colours' after step 16" in said and said.count("beginning step 2") == 1


def test_data_that_cannot_be_read_end_the_run_with_one_clear_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("run")

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    def failing() -> bool:  # asked after every step
        monkeypatch.setattr(os, "pread", broken)
        return False

    case.config = dataclasses.replace(
        case.config, data=dataclasses.replace(case.config.data, read_retries=1, read_backoff_s=0)
    )
    said = r"^the batch of data step 2: .*\.tokens \(domain '\w+'\): Input/output error; unless .* built again$"
    with pytest.raises(StorageError, match=said):
        case.run(should_stop=failing)


def test_skipping_data_without_a_rollback_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"skip_data = True: needs times of at least 1"):
        check(RollbackConfig(skip_data=True))
