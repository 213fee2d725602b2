"""The JobSet manifest of a job: plain data, and its YAML.

What a process's end leads to is said twice: `podFailurePolicy` sorts exit statuses (`launch.exits`), and the JobSet's
`failurePolicy` acts on what that made of the Job.

    status                  the Job                                   the JobSet
    2, 3, 74                fails at once (reason PodFailurePolicy)   fails: nobody starts it again
    75, or a node that      makes the pod anew, not counted           goes on
      was taken away
    any other               fails (no retries: backoffLimit 0)        every Job is made anew, at most max_restarts times

Needs JobSet 0.6 (rules of the failure policy) and Kubernetes 1.26 (pod failure policy).
Read in the documentation and the API of JobSet and of Kubernetes, not run on a cluster. What JobSet's webhook checks of
names, `launch.submit.gke` checks. Of a TPU's own environment GKE sets TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, for
several slices, MEGASCALE_*: it does so for pods of indexed Jobs with a subdomain that ask for google.com/tpu.
"""

import shlex
from typing import TYPE_CHECKING, Any

import yaml

from launch import exits
from launch.submit.base import Job

if TYPE_CHECKING:
    from launch.submit.gke import GkeConfig
    from launch.submit.pods import Pods

REPLICATED = "slice"
"""Name of the replicated Job and so of every slice's Job."""
CONTAINER = "train"
_EXCLUSIVE = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
"""A node pool is a slice: all pods of a Job go to one, and no other Job goes there."""


def manifest(config: "GkeConfig", job: Job) -> dict[str, Any]:
    """The JobSet that runs the job on the config's slices."""
    pods, slices = config.pods, config.topology.slices
    metadata: dict[str, Any] = {"name": config.name, "namespace": config.namespace}
    if config.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": config.queue}
    if pods.tpu and pods.hosts > 1:
        metadata["annotations"] = _EXCLUSIVE
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": config.max_restarts,
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": REPLICATED, "replicas": slices, "template": {"spec": _job(config, job, pods)}},
            ],
        },
    }


def dump(data: dict[str, Any]) -> str:
    """YAML, in the order of the data, with scripts line by line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


def _job(config: "GkeConfig", job: Job, pods: "Pods") -> dict[str, Any]:
    final = sorted(set(exits.FINAL) - {exits.FINISHED})
    return {
        "completionMode": "Indexed",
        "parallelism": pods.hosts,
        "completions": pods.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                _on_exit("FailJob", final),
                _on_exit("Ignore", [exits.AGAIN]),
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(config, job, pods)},
    }


def _on_exit(action: str, values: list[int]) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": values}}


def _pod(config: "GkeConfig", job: Job, pods: "Pods") -> dict[str, Any]:
    volumes, mounts = _volumes(config, pods)
    tolerations: list[dict[str, str]] = [{"key": pods.resource, "operator": "Exists"}]
    if config.spot:
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"})
    container = {
        "name": CONTAINER,
        "image": config.image,
        "command": ["sh", "-c", _script(job, pods.hosts)],
        "env": _environment(config, pods.hosts),
        "resources": {"limits": {pods.resource: str(pods.chips)}},
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace_s,
        "nodeSelector": pods.selector | ({"cloud.google.com/gke-spot": "true"} if config.spot else {}),
        "tolerations": tolerations,
    }
    if config.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if config.service_account:
        spec["serviceAccountName"] = config.service_account
    if config.priority:
        spec["priorityClassName"] = config.priority
    return spec | {"containers": [container], "volumes": volumes}


def _script(job: Job, hosts: int) -> str:
    """What a pod runs. Kubernetes puts variables into $(NAME) and makes one dollar of two, so all are doubled."""
    process = f"MOE_PROCESS_ID=$((MOE_SLICE * {hosts} + JOB_COMPLETION_INDEX))"
    # exec: SIGTERM must reach Python, not the shell.
    script = f"export {process}\nexec {shlex.join(job.command)}\n"
    return script.replace("$", "$$")


def _environment(config: "GkeConfig", hosts: int) -> list[dict[str, Any]]:
    """JOB_COMPLETION_INDEX is set by Kubernetes in pods of an indexed Job."""
    first = f"{config.name}-{REPLICATED}-0-0.{config.name}"
    given = {
        "MOE_COORDINATOR": f"{first}:{config.port}",
        "MOE_NUM_PROCESSES": str(config.topology.slices * hosts),
    } | dict(word.split("=", 1) for word in config.env)
    found: list[dict[str, Any]] = [{"name": name, "value": value.replace("$", "$$")} for name, value in given.items()]
    index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
    found.append({"name": "MOE_SLICE", "valueFrom": index})
    for word in config.secrets:
        name, kept = word.split("=", 1)
        secret, key = kept.split(":", 1)
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def _volumes(config: "GkeConfig", pods: "Pods") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, where they are mounted)."""
    volumes: list[dict[str, Any]] = [{"name": "runs", "persistentVolumeClaim": {"claimName": config.claim}}]
    mounts: list[dict[str, Any]] = [{"name": "runs", "mountPath": config.mount}]
    if not pods.tpu:
        # NCCL exchanges through shared memory, of which a container has 64 MB unless it asks for more.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return volumes, mounts


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; no aliases for data that occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
