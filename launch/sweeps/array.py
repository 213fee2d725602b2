"""Runs of a sweep as one array job of SLURM: a task of the array is a run, started as `launch.submit slurm` starts one.

Written in WORKDIR/sweep/slurm: the batch script, the list of the runs that were not finished when it was submitted, a
log for each task. A task requeues itself, as a job of its own does. Submitted again while the array still runs, the
second task of a run ends at once: the first one holds the run's folder.
"""

import dataclasses
import hashlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launch import exits
from launch.submit.base import Job
from launch.submit.slurm import SlurmConfig, folder_of
from moe.config import ConfigError, at_least
from moe.sweep.folder import config_path
from moe.train.lock import Lock

_RUN = "@RUN@"
"""Where the run's name goes; letters that a shell leaves alone, and the batch script replaces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayConfig(SlurmConfig):
    """One array job of SLURM; what a task of it gets."""

    at_once: int = 0
    """Tasks of the array that run at the same time; 0: as many as there is room for."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, at_once=0)


def array_script(root: Path, name: str, count: int, config: ArrayConfig) -> str:
    """The batch script of `count` runs, which are the lines of `name`.runs."""
    job = Job(spec=str(config_path(root, _RUN)), workdir=str(root / _RUN))
    folder = root / "sweep" / "slurm"
    header, lines = [], []
    for line in config.script(job).splitlines():
        option = re.match(r"#SBATCH --([a-z-]+)", line)
        if option is None:
            lines.append(line)
        elif option[1] not in ("job-name", "output"):
            header.append(line)
    own = [f"job-name={root.name}", f"output={folder}/%A_%a.log", f"array={_array(count, config.at_once)}"]
    header = [f"#SBATCH --{option}" for option in own] + header
    choose = f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / name))}.runs)'
    # The names of runs have no letter that a shell would take for its own.
    body = "\n".join(lines[1:]).replace(str(folder_of(job.workdir)), f"{folder}/$run").replace(_RUN, "$run")
    return "\n".join([lines[0], *header, choose, body]) + "\n"


def _array(count: int, at_once: int) -> str:
    return f"0-{count - 1}" + (f"%{at_once}" if at_once else "")


def submit(root: Path, folders: Sequence[str], config: ArrayConfig, dry_run: bool, prepare: Callable[[], Lock]) -> int:
    """Submits the runs `folders`; `prepare` writes the sweep's folder and takes its lock, here held until submitted."""
    if not folders:
        print("all runs are finished")
        return exits.FINISHED
    listed = "".join(f"{folder}\n" for folder in folders)
    name = f"array-{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
    path = root / "sweep" / "slurm" / name
    files = {f"{path}.runs": listed, f"{path}.sbatch": array_script(root, name, len(folders), config)}
    command = ("sbatch", f"{path}.sbatch")
    if dry_run:
        print("\n\n".join([*(f"# {file}\n{text.rstrip()}" for file, text in files.items()), shlex.join(command)]))
        return exits.FINISHED
    if shutil.which(command[0]) is None:
        raise ConfigError("sbatch: is not on this machine; --dry-run True shows what would be submitted")
    lock = prepare()
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        Path(file).write_text(text)
    status = subprocess.run(command, check=False).returncode
    lock.close()
    return status
