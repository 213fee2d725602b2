"""GKE: a JobSet, one Job for every slice, one pod for every host."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from launch.submit import jobset
from launch.submit.base import Action, Backend, Command, Job, WriteFile
from launch.submit.given import check_environment, check_job, name_problem
from launch.submit.pods import Pods, pods
from moe.config import ConfigError, at_least
from moe.plan.topology import Topology, parse

_SECRET_KEY = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?:[-._a-zA-Z0-9]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeConfig(Backend):
    """A JobSet on node pools of TPUs or GPUs that are there; the cluster is kubectl's current one."""

    name: str
    """Of the JobSet; pods are NAME-slice-SLICE-HOST."""
    slices: str
    """[N*]CHIP:TOPOLOGY, as in v5p:4x4x8, 2*v6e:16x16 or, hosts x GPUs, h200:2x8."""
    image: str
    """Container image with the code, its configs and its packages; SPEC is a path in its working directory."""
    namespace: str = "default"
    """Of Kubernetes; the claim and the Secrets are in it."""
    queue: str = ""
    """Kueue's LocalQueue, if the cluster has one."""
    priority: str = ""
    """Name of a PriorityClass."""
    spot: bool = False
    """Only nodes of spot VMs."""
    service_account: str = ""
    """Kubernetes service account of the pods."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany, as of Filestore) that every pod mounts; the workdir is on it."""
    mount: str = "/mnt/runs"
    """Where the pods mount it."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for the run; nothing secret."""
    secrets: tuple[str, ...] = ()
    """NAME=SECRET:KEY of Kubernetes Secrets; the value goes from there to the pod alone."""
    chips_per_host: int = 0
    """0: 4, or all of a smaller slice; 8 for single hosts of 8 chips of v5e and v6e."""
    accelerator_label: str = ""
    """If the nodes' label is not the usual one of the chip, as nvidia-h100-mega-80gb."""
    host_network: bool = True
    """Pods use their host's network, which is faster between hosts; GKE Autopilot does not allow it."""
    port: int = 8476
    """Of the coordinator, on the first pod."""
    grace_s: int = 300
    """Seconds between SIGTERM and SIGKILL, for a save."""
    max_restarts: int = 20
    """Restarts of the whole JobSet after an error or a lost host; exit status 75 does not count."""
    folder: str = "submitted"
    """Folder on this machine for the manifest."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, max_restarts=0, grace_s=1)
        topology, found = None, None
        try:
            topology = parse(self.slices)
            found = pods(topology, self.chips_per_host, self.accelerator_label)
        except ConfigError as error:
            yield _field(error, "slices")
        # Kubernetes appends a hyphen and five letters to the name of a pod.
        last = f"-{jobset.REPLICATED}-{topology.slices - 1}-{found.hosts - 1}-abcde" if topology and found else ""
        if wrong := name_problem(self.name, self.name + last):
            yield "name", wrong
        for field in ("namespace", "queue", "priority", "service_account", "claim"):
            value = getattr(self, field)
            if (value or field in ("namespace", "claim")) and (wrong := name_problem(value, value)):
                yield field, wrong
        if not self.image or any(letter.isspace() for letter in self.image):
            yield "image", "must be the name of a container image, as REGION-docker.pkg.dev/PROJECT/REPOSITORY/moe:TAG"
        if not re.fullmatch(r"/\S*[^/\s]", self.mount):
            yield "mount", "must be an absolute path"
        if not 1024 <= self.port <= 65535:
            yield "port", "must be from 1024 to 65535"
        check_environment(self.env, self.secrets, "NAME=SECRET:KEY", _SECRET_KEY)

    @property
    def topology(self) -> Topology:
        return parse(self.slices)

    @property
    def pods(self) -> Pods:
        return pods(self.topology, self.chips_per_host, self.accelerator_label)

    def actions(self, job: Job) -> tuple[Action, ...]:
        check_job(job, self.topology.num_devices, self.mount)
        path = Path(self.folder) / f"{self.name}.jobset.yaml"
        return (
            WriteFile(path=path, text=jobset.dump(jobset.manifest(self, job))),
            # The cluster's own schema and webhooks look at it first.
            Command(words=("kubectl", "create", "--dry-run=server", "-f", str(path))),
            # create: of one that is there, apply would say "unchanged" and start nothing.
            Command(words=("kubectl", "create", "-f", str(path))),
        )


def _field(error: ConfigError, default: str) -> tuple[str, str]:
    """(field, limit) of a message 'FIELD = VALUE: LIMIT'."""
    said, _, limit = str(error).partition(": ")
    field = said.partition(" = ")[0]
    return (field if field in {one.name for one in dataclasses.fields(GkeConfig)} else default), limit
