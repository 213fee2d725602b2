"""`launch.submit`: whose word is whose, mistakes before anything is written, and what SLURM is given and gives back."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.submit import __main__ as submit
from launch.submit.base import Command, Job, WriteFile
from launch.submit.slurm import SlurmConfig
from moe.config import check
from moe.train.run import RunConfig
from tests.launch.test_help import help_of

DEBUG = "configs/debug.py:folder"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with text for the run."""
    for domain in ("a", "b"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "text" / domain / f"{index}.txt").write_text(f"some {domain} text {index} " * 200)
    return tmp_path


def data(place: Path) -> list[str]:
    return ["--data.source.path", f"{place}/text", "--data.cache-dir", f"{place}/cache"]


def words(place: Path, backend: str, *more: str) -> list[str]:
    return [backend, DEBUG, "--workdir", f"{place}/run", *data(place), *more]


@pytest.mark.parametrize("name", submit.BACKENDS)
def test_no_field_of_a_backend_is_a_field_of_the_run(name: str) -> None:
    own = {field.name for field in dataclasses.fields(submit.backend_type(name))}
    assert "dry_run" in own and not own & {"workdir", *(field.name for field in dataclasses.fields(RunConfig))}


def test_words_go_to_whom_their_first_name_belongs() -> None:
    given = ["--nodes", "3", "--optim.learning-rate", "-1", "--dry-run", "--env", "A=--b", "C", "--steps=4", "--time=9"]
    mine, others = submit.divide(SlurmConfig, given)
    assert mine == ["--nodes", "3", "--dry-run", "True", "--env", "A=--b", "C", "--time=9"]
    assert others == ["--optim.learning-rate", "-1", "--steps=4"]
    assert submit.divide(SlurmConfig, ["--dry-run", "False", "--dry-run"])[0] == [
        "--dry-run",
        "False",
        "--dry-run",
        "True",
    ]
    assert submit.divide(SlurmConfig, ["--tasks_per_node", "2"])[0] == ["--tasks_per_node", "2"]


MISTAKES = {
    "field of the run": ("slurm --steps many", ["--steps", "many", "int"]),
    "the run's config": ("local --batch-size 7", ["batch_size = 7", "accumulation = 2"]),
    "data that is not there": ("slurm --data.source.path nowhere", ["data.source.path", "nowhere"]),
    "misspelt field": ("slurm --node 2", ["--node"]),
    "field of another backend": ("local --nodes 2", ["--nodes"]),
    "type of a backend's field": ("slurm --nodes two", ["--nodes", "two", "int"]),
    "value of a backend's field": ("slurm --nodes 0", ["nodes = 0", "at least 1"]),
    "real devices twice": ("local --processes 2", ["processes = 2", "devices"]),
    "time": ("slurm --time soon", ["time = 'soon'", "HOURS:MM:SS"]),
    "option with dashes": ("slurm --options -C x", ["options", "-C"]),
    "variable that is not set": ("slurm --env NO_SUCH_VARIABLE", ["env.0", "NO_SUCH_VARIABLE", "not set"]),
    "secret": ("slurm --env A=1 HF_TOKEN=hunter2", ["env.1", "HF_TOKEN", "give the name only"]),
    "no name": ("slurm --env a-b=hunter2", ["env.0 (not shown)"]),
    "letters that SLURM reads": ("slurm --workdir PLACE/100%", ["workdir", "100%"]),
    "no sbatch": ("slurm", ["sbatch", "not on this machine"]),
}
"""(what is typed, but for the config and its data; what the line must contain); PLACE stands for the folder above."""
LINES = {
    "unknown backend": (["pbs", DEBUG], ["backend = 'pbs'", "local, slurm, gke, tpu-vm"]),
    "nothing": ([], ["usage: python -m launch.submit"]),
    "no config": (["local"], ["config: is missing"]),
    "no config, but a field": (["slurm", "--nodes", "2"], ["config: is missing"]),
    "no such config": (["local", "configs/nothing.py"], ["configs/nothing.py", "no such file"]),
    "not a RunConfig": (["local", "configs/debug.py:nothing"], ["nothing", "get_config"]),
}


def one_line(given: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = submit.main(given)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert all(part in said.err for part in parts), said.err
    assert "hunter2" not in said.err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    backend, *flags = MISTAKES[name][0].replace("PLACE", str(place)).split()
    own = [] if "--workdir" in flags else ["--workdir", f"{place}/run"]
    before = sorted(place.rglob("*"))
    one_line([backend, DEBUG, *data(place), *own, *flags], MISTAKES[name][1], capsys)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_says_too_little_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(*LINES[name], capsys)


def test_a_workdir_of_another_run_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").touch()
    one_line(words(place, "local"), ["workdir = ", "not empty"], capsys)


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_help_explains_every_field_of_a_backend(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind: Any = submit.backend_type(backend)
    options = help_of(kind(), capsys)
    for field in dataclasses.fields(kind):
        assert options[f"--{field.name.replace('_', '-')}"], f"{field.name} has no help: add an attribute docstring"
    with pytest.raises(SystemExit) as stop:
        submit.main([backend, DEBUG, "--help"])
    assert stop.value.code == 0 and "--dry-run" in capsys.readouterr().out


def test_local_is_the_supervisor_in_the_place_of_this_process(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(words(place, "local", "--processes", "2", "--devices", "4", "--steps", "10", "--dry-run")) == 0
    shown = capfd.readouterr().out
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(os, "execvp", lambda program, arguments: ran.append(tuple(arguments)))
    submit.main(words(place, "local", "--processes", "2", "--devices", "4", "--steps", "10"))
    assert shown == f"{Command(words=ran[0])}\n"
    split = ran[0].index("--")
    train = [sys.executable, "-m", "launch.train", DEBUG, "--workdir", f"{place}/run", *data(place), "--steps", "10"]
    assert list(ran[0][split + 1 :]) == train
    assert list(ran[0][:3]) == [sys.executable, "-m", "launch.supervise"]
    supervisor = dict(zip(ran[0][3:split:2], ran[0][4:split:2], strict=True))
    assert supervisor["--processes"] == "2" and supervisor["--devices"] == "4"
    assert supervisor["--workdir"] == f"{place}/run"


# SLURM, with programs of its names that only write down what they are given; tests/slurm has the real one.

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=run
#SBATCH --chdir=PLACE
#SBATCH --output=runs/run.slurm/%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --account=lab
#SBATCH --time=1-12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --export=HOME,PATH,XLA_FLAGS,HF_TOKEN
#SBATCH --constraint=h200
export MODE='a b'
module load cuda
exec PYTHON -m launch.submit.slurm_job run --folder runs/run.slurm --workdir runs/run --restarts 5 --backoff-s 3 --backoff-cap-s 60 --grace-s 60 -- \\
  srun --kill-on-bad-exit=1 --label --export=ALL --cpus-per-task=8 \\
  PYTHON -m launch.submit.slurm_job task --folder runs/run.slurm --grace-s 60 -- \\
  PYTHON -m launch.train configs/a.py:b --workdir runs/run --optim.schedule.warmup-steps 3
"""  # noqa: E501


def test_the_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in {"HOME": "/h", "PATH": "/p", "XLA_FLAGS": "x", "HF_TOKEN": "hunter2", "AWS_KEY": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    config = SlurmConfig(
        nodes=2, tasks_per_node=4, gpus_per_node=4, cpus_per_task=8, account="lab", time="1-12:00:00",
        options=("constraint=h200",), env=("HF_TOKEN", "MODE=a b"), setup=("module load cuda",),
    )  # fmt: skip
    check(config)
    job = Job(spec="configs/a.py:b", workdir="runs/run", words=("--optim.schedule.warmup-steps", "3"))
    file, command = config.actions(job)
    assert isinstance(file, WriteFile)
    assert file.text == SCRIPT.replace("PLACE", str(tmp_path)).replace("PYTHON", sys.executable)
    assert command == Command(words=("sbatch", "runs/run.slurm/job.sbatch"))
    simulated = SlurmConfig(tasks_per_node=2, devices=4).script(job)
    assert "export JAX_NUM_CPU_DEVICES=4\nexport JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo\n" in simulated


Scheduler = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def scheduler(place: Path, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """Puts sbatch, srun and scontrol on the PATH; submits, and runs what was submitted as job 7 with two tasks."""
    programs = {
        "sbatch": f'echo "$@" >> {place}/submitted',
        "scontrol": f'echo "$@" >> {place}/asked',
        # Whatever the tasks are told to run is replaced by $TASK. As srun does, it kills the others after a bad end and
        # ends with the highest status.
        "srun": f"""
            while [ "$1" != task ]; do shift; done
            for index in 0 1; do
              SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$index {sys.executable} -m launch.submit.slurm_job \\
                task --folder "$3" --grace-s "$5" -- bash -c "$TASK" & pids[$index]=$!
            done
            highest=0
            for ended in 0 1; do
              wait -n; status=$?
              ((status > highest)) && highest=$status
              ((status)) && kill -9 "${{pids[@]}}" 2>/dev/null
            done
            exit $highest""",
    }
    (place / "bin").mkdir()
    for name, text in programs.items():
        program = place / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")

    def run(task: str) -> "subprocess.CompletedProcess[str]":
        script = place / "run.slurm" / "job.sbatch"
        environment = os.environ | {"SLURM_JOB_ID": "7", "TASK": task}
        return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_is_written_is_what_dry_run_showed(
    place: Path, scheduler: Scheduler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execvp", lambda program, arguments: subprocess.run(arguments, check=True))
    assert submit.main(words(place, "slurm", "--nodes", "2", "--dry-run", "True")) == 0
    shown = capsys.readouterr().out
    assert not (place / "run.slurm").exists()
    assert submit.main(words(place, "slurm", "--nodes", "2")) == 0
    script = place / "run.slurm" / "job.sbatch"
    assert shown == f"# {script}\n{script.read_text()}\nsbatch {script}\n"
    assert (place / "submitted").read_text() == f"{script}\n"
    assert not (place / "run").exists()


@pytest.fixture
def submitted(place: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A job that may fail twice in a row, submitted."""
    monkeypatch.setattr(os, "execvp", lambda program, arguments: None)
    flags = ("--restarts", "2", "--backoff-s", "0", "--backoff-cap-s", "0", "--grace-s", "30")
    assert submit.main(words(place, "slurm", "--tasks-per-node", "2", "--devices", "1", *flags)) == 0
    return scheduler


def requeues(place: Path) -> list[str]:
    return (place / "asked").read_text().splitlines() if (place / "asked").exists() else []


def test_a_job_that_saved_is_requeued_without_counting(place: Path, submitted: Scheduler) -> None:
    for _ in range(3):
        assert submitted("exit 75").returncode == 75
    assert requeues(place) == ["requeue 7"] * 3


def test_a_job_that_fails_is_requeued_a_bounded_number_of_times(place: Path, submitted: Scheduler) -> None:
    last = [submitted("[ $SLURM_PROCID = 0 ] || kill -9 $$") for _ in range(3)][-1]
    assert last.returncode == 137 and "process 1 ended with status 137" in last.stderr and "given up" in last.stderr
    assert len(requeues(place)) == 2
    (place / "run" / "checkpoints" / "5").mkdir(parents=True)  # progress
    submitted("exit 1")
    assert len(requeues(place)) == 3
    # Another job of the same run starts to count anew.
    assert json.loads((place / "run.slurm" / "ends-7.json").read_text()) == {"newest": 5, "failures": 1}


@pytest.mark.parametrize("status", [2, 3, 74])
def test_a_job_that_nobody_can_repair_ends(status: int, place: Path, submitted: Scheduler) -> None:
    # The other task, cut off by that, ends first and with a higher status, which is what srun would say.
    done = submitted(f"if [ $SLURM_PROCID = 0 ]; then sleep 0.5; exit {status}; else kill -ABRT $$; fi")
    assert done.returncode == status and not requeues(place)
    assert f"process 0 ended with status {status}" in done.stderr


def test_a_job_that_is_done_ends(place: Path, submitted: Scheduler) -> None:
    done = submitted("exit 0")
    assert done.returncode == 0 and not requeues(place)


def test_a_step_that_could_not_start_counts_as_a_failure(place: Path, submitted: Scheduler) -> None:
    (place / "bin" / "srun").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert submitted("").returncode == 1
    assert requeues(place) == ["requeue 7"]
