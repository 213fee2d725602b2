"""The quickstart under SLURM, cut off and requeued, against the same run started by hand:

    python -m tests.slurm.quickstart FOLDER [--any.field VALUE ...]

Starts a SLURM of its own (tests/slurm/cluster.py) and runs configs/quickstart.py three times, in FOLDER: by
`launch.submit slurm` as 2 tasks of 4 simulated devices, cut off after a third of its steps by `scancel --signal=TERM`
and after two thirds by `scontrol requeue`; by `launch.submit local` as 2 processes of 4; and as 1 process of 8. Prints
how far the curves are apart. With all 400 steps this takes an hour of two cores, with the words that
tests/slurm/test_slurm.py gives minutes.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from configs import quickstart
from moe.train.metrics import read_metrics
from tests.launch.runs import reproducible
from tests.slurm.cluster import available, cluster

CONFIG = "configs/quickstart.py"
SCANCEL, REQUEUE = ("scancel", "--signal=TERM"), ("scontrol", "requeue")
ENDED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "COMPLETED")
RELEASE_S = 5
Environment = dict[str, str]


def environment(folder: Path) -> Environment:
    """The same for every run, whoever starts it: XLA's flags as shipped, one cache of compiled programs."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_", "MOE_"))
    }
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return kept | cache | {"JAX_PLATFORMS": "cpu"}


def submit(folder: Path, name: str, backend: Sequence[str], words: Sequence[str], env: Environment) -> str:
    """`launch.submit` of the quickstart in FOLDER/NAME; what it said. CalledProcessError if it ends badly."""
    command = [sys.executable, "-m", "launch.submit", backend[0], CONFIG, "--workdir", f"{folder}/{name}"]
    command += [*backend[1:], "--data.cache-dir", f"{folder}/data", *words]
    log = folder / f"{name}.out"
    with log.open("w") as out:
        status = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    assert status == 0, f"{name}: status {status}\n{log.read_text()[-5000:]}"
    return log.read_text()


def run_local(folder: Path, processes: int, devices: int, words: Sequence[str]) -> Path:
    name = f"local-{processes}x{devices}"
    backend = ("local", "--processes", str(processes), "--devices", str(devices))
    submit(folder, name, backend, words, environment(folder))
    return folder / name


def run_slurm(
    folder: Path, words: Sequence[str], cuts: Sequence[tuple[int, tuple[str, ...]]], slurm: Environment, limit_s: float
) -> Path:
    """Runs it as a job of 2 tasks x 4 devices; after each of the steps in `cuts` the command there cuts it off."""
    workdir, env = folder / "slurm", environment(folder) | slurm
    backend = ("slurm", "--tasks-per-node", "2", "--devices", "4")
    said = submit(folder, "slurm", backend, words, env)
    job = Job(re.findall(r"Submitted batch job (\d+)", said)[0], folder / "slurm.slurm", env, limit_s)
    for step, command in cuts:
        job.wait(lambda step=step: last_step(workdir) >= step, f"step {step}")
        before = job.restarts()
        job.ask(*command)
        job.wait(lambda before=before: job.restarts() > before and job.state() == "PENDING", "the requeue")
        # SLURM itself waits two minutes. Released within a second, the job fails: "Job credential revoked".
        time.sleep(RELEASE_S)
        job.wait(job.release, "the next start")
    job.wait(lambda: job.state() == "COMPLETED", "the end")
    assert job.restarts() == len(cuts), f"{job.restarts()} restarts\n{job.log()}"
    return workdir


class Job:
    """A job of SLURM, looked after."""

    def __init__(self, number: str, folder: Path, env: Environment, limit_s: float) -> None:
        self.number, self._folder, self._env = number, folder, env
        self._deadline = time.monotonic() + limit_s

    def ask(self, *words: str) -> str:
        command = [*words, self.number]
        return subprocess.run(command, env=self._env, capture_output=True, text=True, check=False, timeout=60).stdout

    def _field(self, name: str) -> str:
        return re.findall(rf"\b{name}=(\S+)", self.ask("scontrol", "show", "job"))[0]

    def state(self) -> str:
        return self._field("JobState")

    def restarts(self) -> int:
        return int(self._field("Restarts"))

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-6000:] for path in sorted(self._folder.glob("*.log")))

    def release(self) -> bool:
        """Starts a requeued job at once, which SLURM would do after two minutes; whether it is running."""
        if self.state() == "PENDING":
            command = ["scontrol", "update", f"JobId={self.number}", "StartTime=now"]
            subprocess.run(command, env=self._env, capture_output=True, check=False)
        return self.state() == "RUNNING"

    def wait(self, done: Callable[[], bool], what: str) -> None:
        while not done():
            state = self.state()
            assert state not in ENDED, f"waiting for {what}: {state}\n{self.log()}"
            assert time.monotonic() < self._deadline, f"waiting for {what}: {state}, time is up\n{self.log()}"
            time.sleep(0.2)


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return max((int(record["step"]) for record in read_metrics(path)), default=0) if path.exists() else 0


def furthest(here: Path, there: Path) -> tuple[float, str]:
    """The largest relative difference of any value that is no time, and where it is. Differences of values below 1
    count as they are: an imbalance or a loss has a scale, its distance to 0 has none."""
    mine, theirs = reproducible(here), reproducible(there)
    assert [record["step"] for record in mine] == [record["step"] for record in theirs], "not the same steps"
    worst = (0.0, "")
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys(), one.keys() ^ other.keys()
        for name, value in one.items():
            a, b = np.asarray(value, np.float64), np.asarray(other[name], np.float64)
            apart = float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)), initial=0))
            worst = max(worst, (apart, f"{name}, step {one['step']}"))
    return worst


def main() -> None:
    folder, words = Path(sys.argv[1]).absolute(), sys.argv[2:]
    folder.mkdir(parents=True)
    available()
    given = words[words.index("--steps") + 1] if "--steps" in words else quickstart.get_config().steps
    third = int(given) // 3
    with cluster(folder / "cluster") as slurm:
        run_slurm(folder, words, ((third, SCANCEL), (2 * third, REQUEUE)), slurm, 6 * 3600)
    for processes, devices in ((2, 4), (1, 8)):
        other = run_local(folder, processes, devices, words)
        same = reproducible(other) == reproducible(folder / "slurm")
        apart, where = furthest(folder / "slurm", other)
        print(
            f"{processes} x {devices}: {'the same bits' if same else f'at most {apart:.1e} apart ({where})'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
