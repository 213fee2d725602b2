"""`launch.submit slurm`: a batch script that starts one task a process, saves before its time ends, requeues itself.

Written beside the workdir, in WORKDIR.slurm/: `job.sbatch`, the log of every job, the exit status of every task. The
job runs in the folder from which it was submitted, the checkout, which every node must see, as it must the workdir.
A task finds the others by SLURM_* (launch/places.py). What happens in the job is in launch/submit/slurm_job.py.

Ending by hand: `scancel JOB` ends it for good, after saving if SLURM's KillWait is long enough; `scancel --signal=TERM
JOB` has it save and requeue itself.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.restarts import RestartConfig
from launch.submit.base import Action, Backend, Command, Job, WriteFile
from launch.submit.given import SECRET, VARIABLE
from launch.supervise import simulated
from moe.config import ConfigError, at_least

KEPT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_ALL|TMPDIR|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX"
    r"|(JAX|XLA|NCCL|LIBTPU|TF_CPP)_[A-Z0-9_]+"
)
"""Variables of the submitting shell that a job gets if they are set; no others, except those of the field `env`."""
_TIME = re.compile(r"\d+|\d+(:\d\d){1,2}|\d+-\d+(:\d\d){0,2}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmConfig(RestartConfig, Backend):
    """A job of SLURM, one task for each process of the run."""

    same_files = True

    nodes: int = 1
    """Nodes of the job."""
    tasks_per_node: int = 1
    """Processes on each node; one drives all devices of its node."""
    devices: int = 0
    """CPU devices that each process simulates; 0: the real ones."""
    gpus_per_node: int = 0
    """GPUs asked for on each node; 0: none is asked for."""
    cpus_per_task: int = 0
    """CPU cores of each process; 0: what SLURM gives."""
    partition: str = ""
    """Partition; empty: the cluster's default, as in the next two."""
    account: str = ""
    """Account that is charged."""
    time: str = ""
    """Time limit as SLURM writes it: minutes, HOURS:MM:SS or DAYS-HOURS. A run that needs longer is requeued."""
    signal_before_s: int = 300
    """Seconds before the time limit at which the run is told to save; SLURM may tell it up to 60 s earlier."""
    options: tuple[str, ...] = ()
    """More options of sbatch without their dashes: constraint=h200 exclusive."""
    env: tuple[str, ...] = ()
    """Variables for the job: NAME passes this shell's value on without writing it down, NAME=VALUE is written into the
    script. PATH, HOME, JAX_*, XLA_* and a few more are passed on by name anyway (KEPT in launch/submit/slurm.py)."""
    setup: tuple[str, ...] = ()
    """Lines of the batch script before the run starts: 'module load cuda'."""
    python: str = sys.executable
    """Python of the job; every node must have it at this path."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, nodes=1, tasks_per_node=1, devices=0, gpus_per_node=0, cpus_per_task=0)
        yield from at_least(self, signal_before_s=0)
        if self.signal_before_s > 65535:
            yield "signal_before_s", "must be at most 65535, SLURM's limit"
        if self.time and not _TIME.fullmatch(self.time):
            yield "time", "must be minutes, HOURS:MM:SS or DAYS-HOURS:MM:SS"
        if self.devices and self.gpus_per_node:
            yield "gpus_per_node", f"must be 0 where devices are simulated, devices = {self.devices}"
        for option in self.options:
            if option.startswith("-") or not re.match(r"[a-z][a-z-]*(=|$)", option):
                yield "options", f"{option!r} must be NAME or NAME=VALUE, without dashes before it"
        for index, variable in enumerate(self.env):
            name, equals, _ = variable.partition("=")
            # Raised, not yielded: the message must not repeat a value, which may be a secret.
            if not VARIABLE.fullmatch(name):
                raise ConfigError(f"env.{index} (not shown): must be NAME or NAME=VALUE, with letters, digits and _")
            if equals and SECRET.search(name):
                raise ConfigError(f"env.{index} = {name}=...: looks like a secret; give the name only")
            if not equals and name not in os.environ:
                raise ConfigError(f"env.{index} = {name}: is not set in this shell, so it cannot be passed on")

    def actions(self, job: Job) -> tuple[Action, ...]:
        script = folder_of(job.workdir) / "job.sbatch"
        return WriteFile(path=script, text=self.script(job)), Command(words=("sbatch", str(script)))

    def script(self, job: Job) -> str:
        """The whole batch script."""
        folder = folder_of(job.workdir)
        directives = "\n".join(f"#SBATCH --{option}" for option in self._options(folder))
        written = [variable for variable in self.env if "=" in variable]
        written += [f"{name}={value}" for name, value in self._simulated().items()]
        exports = [
            f"export {name}={shlex.quote(value)}" for name, _, value in (word.partition("=") for word in written)
        ]
        module = f"{shlex.quote(self.python)} -m launch.submit.slurm_job"
        restarts = [
            f"--{field.name.replace('_', '-')} {getattr(self, field.name):g}"
            for field in dataclasses.fields(RestartConfig)
        ]
        srun = ["srun --kill-on-bad-exit=1 --label --export=ALL"]
        srun += [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []
        lines = [
            f"exec {module} run --folder {folder} --workdir {job.workdir} {' '.join(restarts)} --",
            " ".join(srun),
            f"{module} task --folder {folder} --grace-s {self.grace_s:g} --",
            shlex.join((self.python, *job.command[1:])),
        ]
        body = [*exports, *self.setup, " \\\n  ".join(lines)]
        return f"#!/usr/bin/env bash\n{directives}\n" + "\n".join(body) + "\n"

    def _options(self, folder: Path) -> Iterator[str]:
        """Options of sbatch, without their dashes."""
        yield f"job-name={folder.stem}"
        yield f"chdir={Path.cwd()}"
        yield f"output={folder}/%j.log"
        yield f"nodes={self.nodes}"
        yield f"ntasks-per-node={self.tasks_per_node}"
        for name in ("gpus_per_node", "cpus_per_task", "partition", "account", "time"):
            if value := getattr(self, name):
                yield f"{name.replace('_', '-')}={value}"
        yield "requeue"
        yield "open-mode=append"
        if self.signal_before_s:
            yield f"signal=TERM@{self.signal_before_s}"
        # By name: the values go from the submitting shell to SLURM and stand in no file of the run.
        kept = [name for name in sorted(os.environ) if KEPT.fullmatch(name)]
        yield "export=" + ",".join(dict.fromkeys([*kept, *(name for name in self.env if "=" not in name)]))
        yield from self.options

    def _simulated(self) -> dict[str, str]:
        return simulated(self.devices, self.nodes * self.tasks_per_node)


def folder_of(workdir: str) -> Path:
    """Where the job's files are: beside the workdir, which holds the run and nothing else."""
    folder = Path(f"{workdir.rstrip('/')}.slurm")
    for path in (folder, Path.cwd()):
        if not re.fullmatch(r"[\w./+=:@-]+", str(path)):  # '%' and '\' mean something in the name of a log
            raise ConfigError(f"workdir = '{path}': for SLURM its path must be letters, digits and ./_+=:@- only")
    return folder
