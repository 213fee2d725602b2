"""TPU VMs: a queued resource of one or several slices; every worker runs the job in a loop that starts it again.

A folder of scripts is written here and copied to the home of every worker, beside the code:

    pack.sh     here: the commit as a git bundle; refuses uncommitted changes, which would stay behind
    wait.sh     here: until the TPUs are there (exit 1 if they never will be)
    install.sh  on every worker: the code, a Python and the packages
    start.sh    on every worker: run.sh in the background; its log is run.log
    run.sh      on every worker: the job, started again by its exit status (`launch.submit.worker`)
    stop.sh     here, by hand: asks every worker to save and end
    delete.sh   here, by hand: gives the TPUs back

Processes find each other by what the TPU's metadata server tells every worker (`launch.places`).
Read, not run: gcloud's reference for `compute tpus queued-resources`; Google's table of runtime versions. The
Cloud TPU API behind it ends with v6e: TPU7x is reached through GKE.
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch.submit import worker_scripts
from launch.submit.base import Action, Backend, Command, Job, WriteFile
from launch.submit.given import check_environment, check_job, name_problem
from moe.config import at_least
from moe.plan.chips import CHIPS
from moe.plan.topology import shapes

_TYPE = re.compile(r"(v4|v5p|v5litepod|v6e)-([1-9]\d*)")
_SECRET = re.compile(r"[-_a-zA-Z0-9]+(/versions/\d+)?")
_EVERYWHERE = ("--node=all", "--worker=all", "--quiet")
FAMILIES = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v5litepod": ("v5e", 1, "v2-alpha-tpuv5-lite"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
"""Accelerator type -> our chip, what its number counts per chip (cores or chips), and the usual runtime version."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmConfig(Backend):
    """A queued resource of TPU VMs, the code of this commit on every worker, and the run there."""

    name: str
    """Of the queued resource, of its nodes (NAME, or NAME-0, NAME-1, ... if there are several) and of the folders."""
    accelerator_type: str
    """As gcloud says it: v6e-16 (chips), v5litepod-16 (chips), v5p-32 (cores, two a chip), v4-32 (cores)."""
    zone: str
    """As europe-west4-a."""
    project: str
    """Id of the Google Cloud project."""
    nodes: int = 1
    """Slices of that type."""
    runtime_version: str = ""
    """Empty: the usual one of the type."""
    spot: bool = False
    """Spot TPUs, which may be taken away."""
    reserved: bool = False
    """TPUs of a reservation of the project."""
    service_account: str = ""
    """E-mail of the account that the workers act as; it must be allowed to read the secrets."""
    share: str
    """HOST:/EXPORT of an NFS server (Filestore) in the workers' network; the workdir is on it."""
    mount: str = "/mnt/runs"
    """Where the workers mount it."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for the run; nothing secret."""
    secrets: tuple[str, ...] = ()
    """NAME=SECRET of Secret Manager; every worker reads the value itself when it starts the run."""
    python: str = "3.12"
    """Version that is installed on the workers, whose own is too old."""
    restarts: int = 5
    """Starts after a failure, in a row without a newer checkpoint; exit status 75 does not count."""
    poll_s: int = 30
    """Seconds between questions whether the TPUs are there."""
    folder: str = "submitted"
    """Folder on this machine for the scripts."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, nodes=1, restarts=0, poll_s=1)
        if wrong := name_problem(self.name, f"{self.name}-{self.nodes - 1}"):
            yield "name", wrong
        if wrong := _type_problem(self.accelerator_type):
            yield "accelerator_type", wrong
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            yield "zone", "must be a zone, as europe-west4-a"
        if not re.fullmatch(r"[a-z][-a-z0-9:.]*[a-z0-9]", self.project):
            yield "project", "must be the id of a project"
        if self.spot and self.reserved:
            yield "reserved", "spot TPUs are not reserved: give one of the two"
        if self.service_account and not re.fullmatch(r"[^@\s]+@[^@\s]+", self.service_account):
            yield "service_account", "must be the e-mail of a service account"
        if not re.fullmatch(r"[^:\s]+:/\S*", self.share):
            yield "share", "must be HOST:/EXPORT of an NFS server, as 10.0.0.2:/runs"
        if not re.fullmatch(r"/\S*[^/\s]", self.mount):
            yield "mount", "must be an absolute path"
        if not re.fullmatch(r"3\.\d+", self.python):
            yield "python", "must be a version, as 3.12"
        check_environment(self.env, self.secrets, "NAME=SECRET", _SECRET)

    @property
    def devices(self) -> int:
        """Devices of JAX: one a chip on each of these TPUs."""
        family, number = self.accelerator_type.rsplit("-", 1)
        return self.nodes * int(number) // FAMILIES[family][1]

    def actions(self, job: Job) -> tuple[Action, ...]:
        check_job(job, self.devices, self.mount)
        folder = Path(self.folder) / self.name
        texts = worker_scripts.scripts(self, job) | {
            "pack.sh": self._pack(folder, job.spec.partition(":")[0]),
            "wait.sh": self._wait(),
            "stop.sh": self._here(self._ssh(worker_scripts.stop(self.name))),
            "delete.sh": self._here(self._gcloud("delete", self.name, "--force", "--quiet")),
        }
        return (
            *(WriteFile(path=folder / name, text=text) for name, text in sorted(texts.items())),
            Command(words=("sh", str(folder / "pack.sh"))),
            Command(words=self._create()),
            Command(words=("sh", str(folder / "wait.sh"))),
            Command(words=self._gcloud("scp", "--recurse", str(folder), f"{self.name}:", *_EVERYWHERE)),
            Command(words=self._ssh(f"sh {self.name}/install.sh")),
            Command(words=self._ssh(f"sh {self.name}/start.sh")),
        )

    def _gcloud(self, verb: str, *words: str) -> tuple[str, ...]:
        where = (f"--zone={self.zone}", f"--project={self.project}")
        return ("gcloud", "compute", "tpus", "queued-resources", verb, *words, *where)

    def _ssh(self, command: str) -> tuple[str, ...]:
        return self._gcloud("ssh", self.name, *_EVERYWHERE, f"--command={command}")

    def _create(self) -> tuple[str, ...]:
        family = self.accelerator_type.rsplit("-", 1)[0]
        nodes = (f"--node-count={self.nodes}", f"--node-prefix={self.name}")
        return self._gcloud(
            "create",
            self.name,
            f"--accelerator-type={self.accelerator_type}",
            f"--runtime-version={self.runtime_version or FAMILIES[family][2]}",
            *(nodes if self.nodes > 1 else (f"--node-id={self.name}",)),
            *(("--spot",) if self.spot else ()),
            *(("--reserved",) if self.reserved else ()),
            *((f"--service-account={self.service_account}",) if self.service_account else ()),
        )

    def _here(self, words: tuple[str, ...]) -> str:
        return f"#!/bin/sh\n# Made by launch.submit tpu-vm.\nexec {shlex.join(words)}\n"

    def _pack(self, folder: Path, config: str) -> str:
        return f"""#!/bin/sh
# Made by launch.submit tpu-vm: the code of the commit.
git ls-files --error-unmatch -- {shlex.quote(config)} >/dev/null || exit 2
git diff --quiet HEAD -- || {{
  echo "error: uncommitted changes would stay behind: commit or stash them" >&2
  exit 2
}}
exec git bundle create --quiet {shlex.quote(str(folder / "code.bundle"))} HEAD
"""

    def _wait(self) -> str:
        ask = shlex.join(self._gcloud("describe", self.name, "--format=value(state.state)"))
        return f"""#!/bin/sh
# Made by launch.submit tpu-vm: waits until the TPUs are there.
while :; do
  state=$({ask}) || exit 1
  echo "{self.name}: $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED|SUSPENDING|SUSPENDED|DELETING) exit 1 ;;
  esac
  sleep {self.poll_s}
done
"""


def _type_problem(name: str) -> str | None:
    found = _TYPE.fullmatch(name)
    if found is None:
        return f"must be TYPE-NUMBER, with a type of {', '.join(FAMILIES)}, as in v6e-16"
    chip, per_chip, _ = FAMILIES[found[1]]
    sizes = sorted({math.prod(shape) * per_chip for shape in shapes(CHIPS[chip])})
    if (number := int(found[2])) in sizes:
        return None
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - number))[:4])
    return f"is no slice; the nearest are {', '.join(f'{found[1]}-{size}' for size in nearest)}"
