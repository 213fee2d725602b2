"""What the pods of one slice are on GKE: which nodes they ask for, how many there are, how many chips each gets.

Read, not measured: Google's "Plan TPUs in GKE" (labels, machine types, topologies) and the tables of xpk 1.16,
which agree. A node pool of several hosts has 4 chips a host; v5e and v6e also have single hosts of 8 chips.
"""

import dataclasses
import math

from moe.config import ConfigError
from moe.plan.topology import Topology

LABELS = {
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
}
"""Chip -> what GKE calls it in the label of a node."""
TPU, GPU = "google.com/tpu", "nvidia.com/gpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pods:
    """The pods of a slice; one pod is one host and one process."""

    selector: dict[str, str]
    """Labels of the nodes they run on."""
    resource: str
    """What Kubernetes calls the chips."""
    chips: int
    """Chips of one pod."""
    hosts: int
    """Pods of one slice."""

    @property
    def tpu(self) -> bool:
        return self.resource == TPU


def pods(topology: Topology, chips_per_host: int = 0, label: str = "") -> Pods:
    """The pods of one slice; 0 and "" are the usual ones. ConfigError for hosts that are not offered."""
    kind, total = topology.chip, math.prod(topology.shape)
    label = label or LABELS[kind.name]
    if kind.platform == "cuda":
        hosts, each = topology.shape
        if topology.slices > 1:
            raise ConfigError(f"slices = {str(topology)!r}: GPUs are one slice; say all hosts, as in {kind.name}:4x8")
        if chips_per_host not in (0, each):
            raise ConfigError(f"chips_per_host = {chips_per_host}: of GPUs the slice says it: {each}")
        return Pods(selector={"cloud.google.com/gke-accelerator": label}, resource=GPU, chips=each, hosts=hosts)
    offered = [min(4, total)] + ([8] if kind.axes == 2 and total == 8 else [])
    chips = chips_per_host or offered[0]
    if chips not in offered:
        raise ConfigError(f"chips_per_host = {chips}: hosts of {topology} have {' or '.join(map(str, offered))}")
    if topology.slices > 1 and total == chips:
        raise ConfigError(f"slices = {str(topology)!r}: GKE joins only slices of several hosts; take a larger one")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
    }
    return Pods(selector=selector, resource=TPU, chips=chips, hosts=total // chips)
