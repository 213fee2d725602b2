"""`launch.submit local`: the processes of a run on this machine, in the foreground, started again if cut off.

The default is one process with all real devices. `--processes 2 --devices 4` simulates two hosts of four devices.
"""

import dataclasses
import sys

from launch.submit.base import Action, Backend, Command, Job
from launch.supervise import GroupConfig, SuperviseConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig(GroupConfig, Backend):
    """Processes on this machine, under a supervisor (launch/supervise.py)."""

    same_files = True

    def actions(self, job: Job) -> tuple[Action, ...]:
        fields = [field.name for field in dataclasses.fields(SuperviseConfig) if field.name != "workdir"]
        words = [word for name in fields for word in (f"--{name.replace('_', '-')}", str(getattr(self, name)))]
        supervisor = (sys.executable, "-m", "launch.supervise", *words, "--workdir", job.workdir, "--")
        return (Command(words=(*supervisor, sys.executable, *job.command[1:])),)
