"""`launch.sweep` with real runs: kill -9 of a worker and of the driver leaves no trace in the report."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import exits
from launch.supervise import Signals
from launch.sweep import main
from launch.sweeps.local import Pool
from launch.sweeps.rows import Display
from moe.sweep.folder import LOCK, is_finished, log_path
from moe.train.load import load_config
from moe.train.lock import Lock, is_held
from tests.launch.runs import environment

STEPS, EVERY = 60, 10
SPEC = """
import dataclasses
from configs import debug
from moe.data import FolderConfig
from moe.sweep import Listed, Sweep
from moe.train.run import CheckpointConfig, EvaluateConfig

def _base():
    c = debug.get_config()
    return dataclasses.replace(
        c, steps={steps}, batch_size=2, accumulation=1, balance=(),
        # One dense layer: what is tested is who starts what when, and most of a run's time is spent on starting.
        model=dataclasses.replace(c.model, num_layers=1, dense_layers=0, moe=None),
        data=dataclasses.replace(
            c.data, source=FolderConfig(path={text!r}), cache_dir={cache!r}, validation_fraction=0.2, seq_len=16),
        checkpoint=CheckpointConfig(every={every}, keep_best=0),
        evaluate=EvaluateConfig(every=0, final_max_bytes=1024))

def get_sweep():
    rates = {{"slow": 1e-4, "plain": 1e-3, "fast": 1e-2}}
    variants = Listed(of={{name: {{"optim.learning_rate": rate}} for name, rate in rates.items()}})
    return Sweep(variants=variants, base=_base(), seeds=(0, 1, 2), baseline="plain")

def one_fails():
    \"\"\"The second has fewer words than its tokenizer, which is seen only once the run starts.\"\"\"
    variants = Listed(of={{"plain": {{"optim.learning_rate": 1e-3}}, "small": {{"model.vocab_size": 200}}}})
    return Sweep(variants=variants, base=_base())
"""


@pytest.fixture(scope="module")
def spec(text: Path) -> Path:
    path = text.parent / "tiny.py"
    path.write_text(SPEC.format(text=str(text), cache=f"{text}-cache", steps=STEPS, every=EVERY))
    return path


@contextlib.contextmanager
def own_environment(text: Path) -> Iterator[None]:
    """For a driver in this process: what its runs inherit, and the signal handlers that it replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(text).items():
            patch.setenv(name, value)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def words(spec: Path, root: Path, *more: str) -> list[str]:
    return [str(spec), "--workdir", str(root), "--workers", "2", "--local.backoff-s", "0", *more]


def wait(what: str, found: object, deadline_s: float = 240.0) -> object:
    """What `found()` gives once it is true."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if value := found():  # type: ignore[operator]
            return value
        time.sleep(0.005)
    pytest.fail(f"{what} did not happen")


def in_flight(root: Path, but: frozenset[Path] = frozenset()) -> list[Path]:
    """Folders of runs with a checkpoint to resume from that a process is training in."""
    found = [path.parents[1] for path in root.glob(f"*/*/checkpoints/{EVERY}")]
    return [run for run in found if run not in but and not is_finished(run, STEPS) and is_held(run / "lock")]


def holder(run: Path) -> int:
    return int((run / "lock").read_text().split()[1])


def running(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def survived(spec: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[Path]]:
    """The folder of a 3 x 3 sweep of which a worker and the driver were killed, and the runs that were hit."""
    root = tmp_path_factory.mktemp("killed") / "tiny"
    command = [sys.executable, "-m", "launch.sweep", *words(spec, root)]
    with (root.parent / "driver.log").open("w") as log:
        driver = subprocess.Popen(command, env=environment(text), stdout=log, stderr=log)
        first = wait("a run with a checkpoint", lambda: in_flight(root))[0]  # type: ignore[index]
        os.kill(holder(first), signal.SIGKILL)
        wait("the end of the killed worker", lambda: not is_held(first / "lock"))
        others = wait("another run in flight", lambda: in_flight(root, frozenset({first})))
        hit = {run for run in root.glob("*/seed-*") if is_held(run / "lock")} | set(others)  # type: ignore[call-overload]
        workers = {holder(run) for run in hit}
        assert driver.poll() is None, "the driver had ended before it could be killed"
        driver.kill()
        driver.wait()
        # Whoever starts the sweep again finds nobody at work: the workers died with their driver.
        wait("the death of the workers", lambda: not any(map(running, workers)), 10.0)
        status = subprocess.run(command, env=environment(text), stdout=log, stderr=log, timeout=400).returncode
    assert status == 0, (root.parent / "driver.log").read_text()[-3000:]
    return root, {first, *hit}


def without_time(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{key: cell for key, cell in row.items() if "time/" not in key} for row in csv.DictReader(file)]


def page_without_time(path: Path) -> list[str]:
    """The page without its date and the column with the time of a step."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("Written by")]
    start = next(index for index, line in enumerate(lines) if "| step, ms |" in line)
    column = lines[start].split("|").index(" step, ms ")
    for index in range(start, start + 5):
        cells = lines[index].split("|")
        lines[index] = "|".join(cells[:column] + cells[column + 1 :])
    return lines


def test_a_sweep_survives_kill_9_of_a_worker_and_of_the_driver(
    survived: tuple[Path, set[Path]], spec: Path, text: Path, tmp_path: Path
) -> None:
    """The report equals that of a sweep whose hit runs were run again in one go; the others never stopped."""
    root, hit = survived
    resumed = [run for run in hit if "resumed at step" in log_path(root, str(run.relative_to(root))).read_text()]
    assert len(hit) >= 2 and len(resumed) >= 2, "too few runs were hit in the middle: the test has lost its teeth"
    reference = tmp_path / "tiny"
    for run in root.glob("*/seed-*"):
        starts = len(json.loads((run / "run.json").read_text())["starts"])
        assert (starts > 1) == (run in hit), f"{run} was started {starts} times"
        if run not in hit:
            shutil.copytree(run, reference / run.relative_to(root))
    with own_environment(text):
        assert main(words(spec, reference)) == 0
    for run in hit:
        again = reference / run.relative_to(root)
        assert len(json.loads((again / "run.json").read_text())["starts"]) == 1
    ours, theirs = root / "report", reference / "report"
    assert len(without_time(ours / "runs.csv")) == 9
    for name in ("runs.csv", "variants.csv"):
        assert without_time(ours / name) == without_time(theirs / name), name
    assert page_without_time(ours / "report.md") == page_without_time(theirs / "report.md")
    for name in ("curves.png", "final.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_failing_run_is_named_and_the_same_command_skips_what_is_finished(
    survived: tuple[Path, set[Path]], spec: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "two"
    shutil.copytree(survived[0] / "plain" / "seed-0", root / "plain" / "seed-0")
    before = (root / "plain" / "seed-0" / "run.json").read_bytes()
    with own_environment(text):
        assert main(words(Path(f"{spec}:one_fails"), root)) == 1
    said = capsys.readouterr().err
    assert "failed: small/seed-0: model.vocab_size = 200: must be at least the 258 of data.tokenizer" in said
    assert (root / "plain" / "seed-0" / "run.json").read_bytes() == before, "a finished run started again"
    page = (root / "report" / "report.md").read_text()
    assert "| `small, seed 0` | 0 of 60 | not started: model.vocab_size = 200: must be" in page


def test_a_folder_of_another_config_is_refused_before_anything_runs(
    survived: tuple[Path, set[Path]], spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(survived[0] / "plain" / "seed-0", tmp_path / "plain" / "seed-0")
    assert load_config(tmp_path / "plain" / "seed-0").steps == STEPS
    with pytest.raises(SystemExit) as stop:
        main(words(spec, tmp_path, "--set", "steps=70"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "holds a run with another config" in said and f"steps: {STEPS} -> 70" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_asked_to_end_it_says_so_by_its_status(
    spec: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(self: Pool, signals: Signals, display: Display) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.first == signal.SIGTERM

    monkeypatch.setattr(Pool, "run", asked)
    with own_environment(text):
        assert main(words(spec, tmp_path / "tiny")) == exits.AGAIN
    page = (tmp_path / "tiny" / "report" / "report.md").read_text()
    assert "No run is finished yet." in page and page.count("| not started |") == 9


def test_a_second_driver_is_refused(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep").mkdir()
    lock = Lock(tmp_path / LOCK, "here", "is busy")
    with pytest.raises(SystemExit) as stop:
        main(words(spec, tmp_path))
    assert stop.value.code == 2
    assert (
        f"another process (pid {os.getpid()} on " in (said := capsys.readouterr().err) and "drives this sweep" in said
    )
    lock.close()


def test_a_dry_run_says_what_it_would_do_and_touches_nothing(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "dry"
    assert main(words(spec, root, "--only", "fa*", "plain/seed-2", "--seeds", "2", "5", "--dry-run", "True")) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["plain/seed-2", "fast/seed-2", "fast/seed-5"]
    assert said[0].endswith(f"python -m launch.train {root}/sweep/plain/seed-2.json --workdir {root}/plain/seed-2")
    assert not root.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--only", "plan"], "only = 'plan': matches none of slow, plain, fast"),
        (["--set", "optim.lerning_rate=1"], "optim.lerning_rate = 1: AdamWConfig has no field 'lerning_rate'"),
        (["--set", "steps"], "set = 'steps': must be PATH=VALUE"),
        (["--set", "data.source.path=/nowhere/at/all"], "data.source.path = '/nowhere/at/all'"),
        (["--workers", "0"], "workers = 0: must be at least 1"),
        (["--slurm.at-once", "4"], "slurm.at_once = 4: is ignored with backend = local"),
        (["--backend", "slurm"], "workers = 2: is ignored with backend = slurm"),
        (["--backend", "cloud"], "cloud"),
        (["--wrokers", "2"], "--wrokers"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], said: str, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words(spec, tmp_path / "none"), *more])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "none").exists()


def test_a_function_that_gives_no_sweep_and_a_folder_that_holds_a_run_are_refused(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, workdir, said in (
        ("configs/debug.py:get_config", tmp_path / "none", "must return a Sweep, got RunConfig"),
        (str(spec), tmp_path, "holds a run, so it cannot hold a sweep"),
    ):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(SystemExit):
            main([given, "--workdir", str(workdir)])
        assert said in capsys.readouterr().err


def test_an_array_job_has_a_task_for_each_run_that_is_left(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "tiny"
    more = ["--backend", "slurm", "--slurm.at-once", "4", "--slurm.time", "30", "--dry-run", "True", "--seeds", "1"]
    assert main([str(spec), "--workdir", str(root), *more]) == 0
    said = capsys.readouterr().out
    listed, _, script = said.partition(".sbatch\n")
    assert [line for line in listed.splitlines() if "/seed-" in line] == ["slow/seed-1", "plain/seed-1", "fast/seed-1"]
    assert "#SBATCH --array=0-2%4" in script and "#SBATCH --time=30" in script
    assert f"#SBATCH --output={root}/sweep/slurm/%A_%a.log" in script and "@RUN@" not in script
    runs = next(root.parent.glob("**/*.runs"), None)
    assert runs is None, "a dry run wrote"

    # The body as a shell runs it in task 1 of the array, with programs that say how they were called.
    name = listed.partition("# ")[2].splitlines()[0]
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("slow/seed-1\nplain/seed-1\nfast/seed-1\n")
    body = script.partition("sbatch ")[0].replace("exec ", "echo ")
    done = subprocess.run(["bash", "-c", body], env={"SLURM_ARRAY_TASK_ID": "1", "PATH": os.environ["PATH"]},
                          capture_output=True, text=True, check=True)  # fmt: skip
    train = f"-m launch.train {root}/sweep/plain/seed-1.json --workdir {root}/plain/seed-1"
    assert done.stdout.strip().endswith(train), done.stdout
    assert f"--folder {root}/sweep/slurm/plain/seed-1 --workdir {root}/plain/seed-1" in done.stdout
