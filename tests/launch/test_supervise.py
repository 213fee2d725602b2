"""The supervisor with processes that end in every way: who is waited for, who is killed, what is started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import exits
from launch.restarts import End, RestartConfig, Restarts, most_telling, newest_step
from launch.supervise import Group, GroupConfig, Signals, supervise
from moe.config import ConfigError, check

QUICK = RestartConfig(restarts=2, backoff_s=0, backoff_cap_s=0, grace_s=30)


class Starts:
    """Starts shell commands, one list of them a start, and counts."""

    def __init__(self, *commands: list[str]) -> None:
        self.commands, self.count = commands, 0
        self.groups: list[Group] = []

    def __call__(self) -> Group:
        words = self.commands[min(self.count, len(self.commands) - 1)]
        self.count += 1
        # The command of a process stands in its environment, as all run the same words.
        self.groups.append(Group(["bash", "-c", 'eval "$COMMAND"'], [{"COMMAND": word} for word in words]))
        return self.groups[-1]


def run(workdir: Path, starts: Starts, config: RestartConfig = QUICK) -> int:
    return supervise(config, workdir, starts, Signals(), lambda seconds: None)


def save(workdir: Path, step: str) -> str:
    return f"mkdir -p {workdir}/checkpoints/{step}"


@pytest.mark.parametrize("status", [exits.MISTAKE, exits.NUMBERS, exits.STORAGE])
def test_a_status_that_nobody_can_repair_ends_it_whoever_was_first(
    status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Process 1 loses its peer and aborts before the one with the mistake is through.
    starts = Starts([f"while [ ! -e {tmp_path}/aborted ]; do sleep 0.02; done; exit {status}",
                     f"touch {tmp_path}/aborted; kill -ABRT $$"])  # fmt: skip
    assert run(tmp_path, starts) == status
    assert starts.count == 1
    assert f"process 0 ended with status {status}" in capfd.readouterr().err


def test_a_failure_is_started_again_and_then_finishes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    starts = Starts(["true", "kill -9 $$"], ["true", "true"])
    assert run(tmp_path, starts) == exits.FINISHED and starts.count == 2
    said = capfd.readouterr().err
    assert "process 1 ended with status 137 (ended by signal 9, SIGKILL); 0 s until start 1 of at most 2" in said


def test_a_crash_loop_is_bounded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    starts = Starts([f"{save(tmp_path, '10')}; exit 1"])
    # The first failure comes after progress, and counts as the first of three.
    assert run(tmp_path, starts) == exits.FAILED and starts.count == 3
    assert "given up" in capfd.readouterr().err


def test_progress_forgives_earlier_failures(tmp_path: Path) -> None:
    each = [[f"{save(tmp_path, str(step // 2))}; exit 76"] for step in range(12)]
    starts = Starts(*each, ["true"])  # a newer checkpoint at every second start, two restarts allowed
    assert run(tmp_path, starts) == exits.FINISHED and starts.count == 13


def test_a_half_written_checkpoint_is_no_progress(tmp_path: Path) -> None:
    each = [[save(tmp_path, f"{step}.orbax-checkpoint-tmp") + "; exit 1"] for step in range(9)]
    assert run(tmp_path, starts := Starts(*each)) == exits.FAILED and starts.count == 3
    assert newest_step(tmp_path) == -1
    (tmp_path / "checkpoints" / "7").mkdir()
    assert newest_step(tmp_path) == 7


def test_who_was_asked_to_end_is_started_again_without_counting(tmp_path: Path) -> None:
    starts = Starts(*[["exit 75", "exit 75"]] * 5, ["true", "true"])
    assert run(tmp_path, starts, RestartConfig(restarts=0, backoff_s=0)) == exits.FINISHED and starts.count == 6


def test_a_process_that_stays_behind_is_killed_with_all_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stays = f"sleep 300 & echo $! > {tmp_path}/child; trap '' TERM; while true; do sleep 0.1; done"
    fails = f"while [ ! -s {tmp_path}/child ]; do sleep 0.02; done; exit 3"
    assert run(tmp_path, Starts([stays, fails]), RestartConfig(grace_s=0.2)) == exits.NUMBERS
    assert "killed process 0, still running 0.2 s after process 1 ended with status 3" in capfd.readouterr().err
    assert gone(int((tmp_path / "child").read_text()))


def gone(process: int) -> bool:
    """Whether a process is no more, or is a zombie, within a few seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("statuses", "told"),
    [((0, 0), 0), ((0, 75), 75), ((75, 137), 137), ((134, 1), 134), ((1, 134), 1), ((76, 134, 3), 3), ((74, 3, 2), 2)],
)
def test_which_end_says_what_happened(statuses: tuple[int, ...], told: int) -> None:
    assert most_telling([End(index, status) for index, status in enumerate(statuses)]).status == told


def test_waits_double_up_to_a_cap_and_start_over_after_progress() -> None:
    config, restarts = RestartConfig(restarts=5, backoff_s=2, backoff_cap_s=10), Restarts(newest=-1)
    newest = [-1, -1, -1, -1, 3, 3]
    decisions = [restarts.after(End(0, 1), step, config) for step in newest]
    assert [decision.wait_s for decision in decisions] == [2, 4, 8, 10, 2, 4]
    # Restored from an older checkpoint, because the newest was damaged: no progress before it is passed.
    assert restarts.after(End(0, 1), 2, config).wait_s == 8


def test_the_environment_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GroupConfig(processes=2, devices=4)
    check(config)
    assert config.environment(1, 77) == {
        "MOE_COORDINATOR": "127.0.0.1:77", "MOE_NUM_PROCESSES": "2", "MOE_PROCESS_ID": "1", "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }  # fmt: skip
    # Alone there is nobody to reduce with, and real devices are found as always.
    assert "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in GroupConfig(devices=8).environment(0, 77)
    assert not any(name.startswith(("JAX", "CUDA")) for name in GroupConfig().environment(0, 77))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert GroupConfig(processes=2, gpus=4).environment(1, 77)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert GroupConfig(processes=2, gpus=1).environment(1, 77)["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize("wrong", [GroupConfig(processes=2), GroupConfig(processes=2, devices=2, gpus=1)])
def test_devices_that_would_be_taken_twice_are_refused(wrong: GroupConfig) -> None:
    with pytest.raises(ConfigError, match="devices"):
        check(wrong)


# The whole command: signals, and its own death.

Supervisor = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """Starts `launch.supervise` on two bash processes; every process that is left is killed at the end."""
    started = []

    def start(command: str, *flags: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "launch.supervise", "--processes", "2", "--devices", "1", *flags]
        words += ["--workdir", str(tmp_path), "--", "bash", "-c", command]
        started.append(
            subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"D": str(tmp_path)})
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
    for note in tmp_path.glob("pid.*"):  # who outlived it would hold its stderr open
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(note.read_text()), signal.SIGKILL)
    for process in started:
        process.communicate()


def wait_for_files(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} of {list(folder.iterdir())}"
        time.sleep(0.02)


LIVES = """
trap 'echo $MOE_COORDINATOR >> $D/told.$MOE_PROCESS_ID' TERM
echo $$ > $D/pid.$MOE_PROCESS_ID; touch $D/up.$MOE_PROCESS_ID
until [ -s $D/told.$MOE_PROCESS_ID -a -e $D/saved ]; do sleep 0.05; done
exit 75
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_a_signal_is_passed_on_once_and_waited_for(
    number: signal.Signals, status: int, supervisor: Supervisor, tmp_path: Path
) -> None:
    process = supervisor(LIVES)
    wait_for_files(tmp_path, "up.0", "up.1")
    process.send_signal(number)
    wait_for_files(tmp_path, "told.0", "told.1")
    process.send_signal(signal.SIGTERM)  # schedulers repeat themselves; a save must not be cut off by that
    time.sleep(0.2)
    (tmp_path / "saved").touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert all((tmp_path / f"told.{index}").read_text().count("\n") == 1 for index in (0, 1))
    assert f"{number.name}: the processes are asked to save and end" in said and "not started again" in said


def test_a_second_interrupt_kills(supervisor: Supervisor, tmp_path: Path) -> None:
    process = supervisor(LIVES)  # never saved
    wait_for_files(tmp_path, "up.0", "up.1")
    process.send_signal(signal.SIGINT)
    wait_for_files(tmp_path, "told.0", "told.1")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "killed process 0, process 1" in said


def test_killed_itself_it_leaves_nobody(supervisor: Supervisor, tmp_path: Path) -> None:
    process = supervisor(LIVES)
    wait_for_files(tmp_path, "up.0", "up.1")
    pids = [int((tmp_path / f"pid.{index}").read_text()) for index in (0, 1)]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)


def test_asked_to_end_while_it_waits_it_ends_at_once(supervisor: Supervisor, tmp_path: Path) -> None:
    process = supervisor("touch $D/up.$MOE_PROCESS_ID; exit 1", "--backoff-s", "1000", "--backoff-cap-s", "1000")
    assert process.stderr is not None
    assert "1000 s until start 1" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_every_start_has_a_port_of_its_own(supervisor: Supervisor, tmp_path: Path) -> None:
    command = "echo $MOE_COORDINATOR >> $D/ports.$MOE_PROCESS_ID; exit 1"
    process = supervisor(command, "--restarts", "3", "--backoff-s", "0", "--backoff-cap-s", "0")
    process.communicate(timeout=60)
    assert process.returncode == 1
    ports = [(tmp_path / f"ports.{index}").read_text().split() for index in (0, 1)]
    assert ports[0] == ports[1] and len(ports[0]) == 4 and len(set(ports[0])) > 1


@pytest.mark.parametrize("words", [[], ["--processes", "2", "--devices", "1", "--workdir", "x"], ["--", "true"],
                                   ["--workdir", "x", "--processes", "2", "--", "true"]])  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from launch.supervise import main

    try:
        status: object = main(words)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
