"""How the runs of a sweep go on side by side: tries, failures, devices, being asked to end. Runs are shell scripts."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.sweeps import local
from launch.sweeps.local import LocalConfig, Pool, Worker, make_workers, visible_gpus
from launch.sweeps.rows import Display, Row
from moe.config import ConfigError, check
from moe.sweep.folder import log_path, read_end
from moe.train.lock import Lock

STEPS = 5
DONE = json.dumps({"mean_bits_per_byte": 2.0, "steps": STEPS, "evaluation_step": STEPS})
FINISH = f"echo '{DONE}' > $RUN/summary.json; exit 0"
QUICK = LocalConfig(restarts=2, backoff_s=0.0)


class Asked:
    """A signal that never came, or that comes when `when` says so."""

    def __init__(self, when: Callable[[], bool] = lambda: False) -> None:
        self._when, self.interrupts = when, 0

    @property
    def first(self) -> int | None:
        return signal.SIGTERM if self._when() else None


def carry_out(
    root: Path, scripts: dict[str, str], config: LocalConfig = QUICK, workers: int = 1, asked: Asked | None = None
) -> tuple[dict[str, Row], str]:
    """The rows after all scripts have run, each with its folder in RUN, and what was displayed."""
    rows = [Row(root, f"{name}/seed-0", STEPS) for name in scripts]
    commands = {}
    for row, script in zip(rows, scripts.values(), strict=True):
        (root / row.folder).mkdir(parents=True)
        commands[row.folder] = ("sh", "-c", f"RUN={root / row.folder}; echo start >> $RUN/starts; {script}")
    said = io.StringIO()
    pool = Pool(root, rows, commands, [Worker({"PLACE": str(index)}, ()) for index in range(workers)], config)
    with Display(rows, said) as display:
        pool.run(asked or Asked(), display)  # type: ignore[arg-type]
    return {row.folder.partition("/")[0]: row for row in rows}, said.getvalue()


def starts(root: Path, name: str) -> int:
    return len((root / name / "seed-0" / "starts").read_text().splitlines())


def test_a_failing_run_is_named_and_stops_nobody(tmp_path: Path) -> None:
    mistake = "echo 'error: steps = 0: must be at least 1' >&2; exit 2"
    rows, said = carry_out(tmp_path, {"bad": mistake, "good": FINISH})
    assert (rows["bad"].state, rows["good"].state) == ("failed", "done")
    assert rows["bad"].message == "steps = 0: must be at least 1" and starts(tmp_path, "bad") == 1
    assert read_end(tmp_path, "bad/seed-0") == (2, "steps = 0: must be at least 1")
    assert "bad/seed-0: failed, step 0/5, steps = 0" in said and "2 runs: 1 failed, 1 done" in said


def test_a_run_that_says_it_is_done_and_is_not_has_failed(tmp_path: Path) -> None:
    assert carry_out(tmp_path, {"liar": "exit 0"})[0]["liar"].state == "failed"


def test_a_killed_run_is_started_again_but_not_for_ever(tmp_path: Path) -> None:
    twice = f"[ $(wc -l < $RUN/starts) -gt 2 ] || kill -9 $$; {FINISH}"
    rows, _ = carry_out(tmp_path, {"twice": twice, "always": "kill -9 $$"}, workers=2)
    assert (rows["twice"].state, starts(tmp_path, "twice")) == ("done", 3)
    assert (rows["always"].state, starts(tmp_path, "always")) == ("failed", 3)
    assert rows["always"].message == "ended by signal 9, SIGKILL"


def test_what_a_failed_run_said_at_an_earlier_start_is_not_its_last_word(tmp_path: Path) -> None:
    log_path(tmp_path, "run/seed-0").parent.mkdir(parents=True)
    log_path(tmp_path, "run/seed-0").write_text("error: an old one\n")
    assert carry_out(tmp_path, {"run": "echo a new one; exit 3"})[0]["run"].message == "a new one"


def test_each_worker_has_one_run_at_a_time(tmp_path: Path) -> None:
    """A run that finds the other's mark on its worker writes it down."""
    mark = "m=$RUN/../../at-$PLACE; [ ! -e $m ] || touch $RUN/../../met; touch $m; sleep 0.2; rm $m"
    carry_out(tmp_path, dict.fromkeys("abcd", f"{mark}; echo $PLACE > $RUN/place; {FINISH}"), workers=2)
    assert {(tmp_path / name / "seed-0" / "place").read_text().strip() for name in "abcd"} == {"0", "1"}
    assert not (tmp_path / "met").exists()


def test_asked_to_end_it_lets_the_runs_save_and_starts_no_more(tmp_path: Path) -> None:
    saving = "trap 'echo saved > $RUN/saved; exit 75' TERM; touch $RUN/ready; while :; do sleep 0.02; done"
    ready = tmp_path / "first" / "seed-0" / "ready"
    rows, _ = carry_out(tmp_path, {"first": saving, "second": FINISH}, asked=Asked(ready.exists))
    assert (tmp_path / "first" / "seed-0" / "saved").exists()
    assert (rows["first"].state, rows["second"].state) == ("waiting", "waiting")
    assert not (tmp_path / "second" / "seed-0" / "starts").exists()


def test_one_that_does_not_end_is_killed_after_its_grace(tmp_path: Path) -> None:
    deaf = "trap '' TERM; echo $$ > $RUN/pid; while :; do sleep 0.02; done"
    pid = tmp_path / "deaf" / "seed-0" / "pid"
    ready = lambda: pid.exists() and bool(pid.read_text())  # noqa: E731
    carry_out(tmp_path, {"deaf": deaf}, LocalConfig(grace_s=0.3), asked=Asked(ready))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_folder_that_another_process_holds_is_waited_for(tmp_path: Path) -> None:
    lock: list[Lock] = []

    def hold_then_let_go() -> bool:
        if not lock:
            lock.append(Lock(tmp_path / "run" / "seed-0" / "lock", "here", "is busy"))
        elif len(lock) == 1 and (tmp_path / "free" / "seed-0" / "summary.json").exists():
            assert not (tmp_path / "run" / "seed-0" / "starts").exists(), "it was started in a folder that is held"
            lock[0].close()
            lock.append(lock[0])
        return False

    rows, _ = carry_out(tmp_path, {"run": FINISH, "free": FINISH}, asked=Asked(hold_then_let_go))
    assert {row.state for row in rows.values()} == {"done"}


def test_devices_and_cores_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"CUDA_VISIBLE_DEVICES": "3,5,GPU-a,GPU-b"}
    found = [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in make_workers(2, LocalConfig(gpus=2), here)]
    assert found == ["3,5", "GPU-a,GPU-b"]
    with pytest.raises(ConfigError, match=r"workers = 3: with 2 GPUs each they need 6, and 4 are visible"):
        make_workers(3, LocalConfig(gpus=2), here)
    alone = make_workers(1, LocalConfig(), here)
    assert alone[0].environment["CUDA_VISIBLE_DEVICES"] == "3,5,GPU-a,GPU-b"
    with pytest.raises(ConfigError, match="workers = 5: with 1 GPUs each they need 5, and 4 are visible"):
        make_workers(5, LocalConfig(), here)
    with pytest.raises(ConfigError, match=r"local.gpus = 1: no GPU is visible here"):
        make_workers(1, LocalConfig(gpus=1), {"CUDA_VISIBLE_DEVICES": ""})
    simulated = make_workers(2, LocalConfig(devices=4), here)
    assert [worker.environment["JAX_NUM_CPU_DEVICES"] for worker in simulated] == ["4", "4"]
    assert all("CUDA_VISIBLE_DEVICES" not in worker.environment for worker in simulated)
    assert all(worker.environment["MOE_NUM_PROCESSES"] == "1" for worker in simulated)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7, 4, 2, 9, 11})
    pinned = make_workers(2, LocalConfig(pin=True), {"JAX_PLATFORMS": "cpu"})
    assert [worker.prefix[-1] for worker in pinned] == ["2,4", "7,9"]
    with pytest.raises(ConfigError, match=r"workers = 6: .* as many cores, and 5 are here"):
        make_workers(6, LocalConfig(pin=True), {"JAX_PLATFORMS": "cpu"})


def test_pinning_needs_the_program_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    check(LocalConfig())
    with pytest.raises(ConfigError, match="pin = True: needs the program taskset"):
        check(LocalConfig(pin=True))


def test_the_table_shows_how_far_each_run_is(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    rows = [
        Row(tmp_path, f"{name}/seed-0", 10, state) for name, state in (("a", "done"), ("b", "running"), ("c", "failed"))
    ]
    (tmp_path / "b" / "seed-0").mkdir(parents=True)
    (tmp_path / "b" / "seed-0" / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    rows[2].message = "steps = 0"
    stream = Terminal()
    with Display(rows, stream) as display:
        display.update()
    shown = stream.getvalue()
    assert (
        "3 runs: 1 running, 1 failed, 1 done" in shown
        and "4/10" in shown
        and "2.5000" in shown
        and "steps = 0" in shown
    )
    assert shown.index("b/seed-0") < shown.index("c/seed-0") < shown.index("a/seed-0")
