"""What the batch script of `launch.submit slurm` runs inside the job:

    python -m launch.submit.slurm_job run --folder DIR --workdir DIR -- srun ...       in the batch script
    python -m launch.submit.slurm_job task --folder DIR -- python -m launch.train ...  as each task

A task notes how it ended and leaves the others time to end by themselves: srun's own status is the highest, so that 137
of the tasks it kills would hide the 2 of the one that names the mistake. After the step `run` ends the job with the
most telling status, or requeues it, after a wait and a bounded number of times without progress (launch/restarts.py).
`scancel` of the job ends `run` itself, so nothing brings a cancelled job back.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch import exits
from launch.restarts import End, RestartConfig, Restarts, most_telling, newest_step
from launch.supervise import Group, Signals, wait_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig(RestartConfig):
    """One start of the run within a job."""

    folder: str
    """Where the job's files are."""
    workdir: str = ""
    """Folder of the run; a newer checkpoint in it is progress."""

    @property
    def ends(self) -> Path:
        """The folder with the exit status of every task, by its number."""
        return Path(self.folder) / f"ends-{os.environ['SLURM_JOB_ID']}"


def run(config: StepConfig, srun: list[str]) -> int:
    """One start of the step, and what follows from its end."""
    ends, memory = config.ends, config.ends.with_suffix(".json")
    ends.mkdir(parents=True, exist_ok=True)
    for old in ends.iterdir():
        old.unlink()
    workdir = Path(config.workdir)
    if not memory.exists():
        memory.write_text(json.dumps(dataclasses.asdict(Restarts(newest=newest_step(workdir)))))
    restarts = Restarts(**json.loads(memory.read_text()))
    status = subprocess.run(srun, check=False).returncode
    end = ended(ends, status if status >= 0 else 128 - status)
    decision = restarts.after(end, newest_step(workdir), config)
    partial = memory.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(restarts)))
    partial.replace(memory)
    print(f"job {os.environ['SLURM_JOB_ID']}: {decision.line}", file=sys.stderr, flush=True)
    if decision.again:
        time.sleep(decision.wait_s)
        subprocess.run(("scontrol", "requeue", os.environ["SLURM_JOB_ID"]), check=False)
    return end.status


def ended(folder: Path, srun_status: int) -> End:
    """The most telling end of the tasks that ended by themselves; srun's own if none of them explains it."""
    notes = sorted(folder.glob("[0-9]*"), key=lambda path: path.stat().st_mtime_ns)
    ends = [End(int(note.name), int(note.read_text())) for note in notes if note.name.isdigit()]
    told = most_telling(ends) if ends else None
    if told is None or (not told.status and srun_status):
        return End(int(os.environ.get("SLURM_PROCID", 0)), srun_status)
    return told


def task(config: StepConfig, command: list[str]) -> int:
    """One process of the run: passes SIGTERM on, notes the exit status, waits for the others after a bad one."""
    ends, index, tasks = config.ends, os.environ["SLURM_PROCID"], int(os.environ["SLURM_STEP_NUM_TASKS"])
    signals = Signals()
    signals.listen()
    # SLURM signals the task alone or, by its configuration, all that runs in it too.
    status = wait_for(Group(command, [{}]), signals, config.grace_s, quiet=True).status
    partial = ends / f"partial-{index}"
    partial.write_text(str(status))
    partial.replace(ends / index)
    deadline = time.monotonic() + config.grace_s
    while status != exits.FINISHED and time.monotonic() < deadline and len(list(ends.glob("[0-9]*"))) < tasks:
        time.sleep(0.2)
    return status


def main(words: list[str] | None = None) -> int:
    from launch.cli import one_line_errors, parse

    words = sys.argv[1:] if words is None else words
    what, split = words[0], words.index("--")
    with one_line_errors():
        config = parse(StepConfig, words[1:split], "python -m launch.submit.slurm_job")
    return {"run": run, "task": task}[what](config, words[split + 1 :])


if __name__ == "__main__":
    sys.exit(main())
