"""`launch.submit gke` and `tpu-vm`: dry runs are goldens (MOE_UPDATE_GOLDENS=1 writes them), manifests fit the schema.

The schema of JobSet is read from the package kubeflow-trainer-api (Apache-2.0), whose types are generated from the
OpenAPI documents that JobSet and Kubernetes publish: names of fields, their types, required ones, closed values.
"""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_failure_policy_rule import JobsetV1alpha2FailurePolicyRule
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import exits
from launch.submit import jobset
from launch.submit.base import Backend, Job, WriteFile
from launch.submit.gke import GkeConfig
from launch.submit.pods import LABELS, pods
from launch.submit.tpu_vm import FAMILIES, TpuVmConfig
from moe.config import ConfigError, check
from moe.plan.chips import CHIPS
from moe.plan.topology import parse, shapes
from moe.train.run import RunConfig

GOLDENS = Path(__file__).parent / "goldens"
JOB = Job(spec="configs/debug.py", workdir="/mnt/runs/a", words=("--batch-size", "64", "--steps", "100"))
GKE = GkeConfig(name="moe-a", slices="v5p:2x2x2", image="eu-docker.pkg.dev/p/r/moe:4f2c", claim="runs")
MULTISLICE = dataclasses.replace(
    GKE,
    slices="2*v6e:4x4",
    queue="research",
    spot=True,
    service_account="moe",
    secrets=("HF_TOKEN=hugging-face:token",),
)
GPU = dataclasses.replace(GKE, slices="h200:2x8", env=("NCCL_DEBUG=WARN",), host_network=False, priority="high")
VM = TpuVmConfig(
    name="moe-a", accelerator_type="v6e-16", zone="europe-west4-a", project="my-project", share="10.0.0.2:/runs"
)
VMS = dataclasses.replace(
    VM, nodes=2, spot=True, env=("NOTE=two words",), secrets=("HF_TOKEN=hf-token",), service_account="a@b.com"
)
BACKENDS: dict[str, Backend] = {
    "gke-tpu": GKE, "gke-tpu-multislice": MULTISLICE, "gke-gpu": GPU, "tpu-vm": VM, "tpu-vm-multislice": VMS,
}  # fmt: skip
MANIFESTS = {name: jobset.manifest(one, JOB) for name, one in BACKENDS.items() if isinstance(one, GkeConfig)}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_dry_run_is_the_golden(name):
    check(BACKENDS[name])
    text = "\n\n".join(map(str, BACKENDS[name].actions(JOB))) + "\n"
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("MOE_UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()


def faults(manifest: dict[str, Any]) -> str | None:
    """What the schema has against a manifest; a field that it does not know is lost on the way through it."""
    try:
        through = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    except ValueError as error:
        return str(error)
    return None if through == manifest else f"changed: {through}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_written_manifest_fits_the_published_schema(name):
    text = next(action.text for action in BACKENDS[name].actions(JOB) if isinstance(action, WriteFile))
    assert yaml.safe_load(text) == MANIFESTS[name]
    assert faults(yaml.safe_load(text)) is None
    (rule,) = MANIFESTS[name]["spec"]["failurePolicy"]["rules"]
    # The schema lists the actions of a rule in words only.
    assert rule["action"] in JobsetV1alpha2FailurePolicyRule.model_fields["action"].description


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "replicatedJobs", 0, "name"), None),
        (("spec", "failurePolicy", "restarts"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), "indexed"),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "action"), "FailJobSet"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeSelectors"), {"a": "b"}),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "command"), "sh"),
    ],
)
def test_a_broken_manifest_does_not_fit_the_schema(path, value):
    broken = yaml.safe_load(jobset.dump(MANIFESTS["gke-tpu"]))
    *above, last = path
    at = broken
    for key in above:
        at = at[key]
    at[last] = value
    assert faults(broken) is not None


def container(name: str) -> dict[str, Any]:
    (replicated,) = MANIFESTS[name]["spec"]["replicatedJobs"]
    (found,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("name, slices, hosts", [("gke-tpu", 1, 2), ("gke-tpu-multislice", 2, 4), ("gke-gpu", 1, 2)])
def test_pods_count_themselves_and_start_the_job(tmp_path, name, slices, hosts):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$MOE_PROCESS_ID $*"\n')
    fake.chmod(0o755)
    shell, flag, script = container(name)["command"]
    assert "$" not in script.replace("$$", "")
    told = {one["name"]: one.get("value") for one in container(name)["env"]}
    assert told["MOE_NUM_PROCESSES"] == str(slices * hosts) and told["MOE_COORDINATOR"] == "moe-a-slice-0-0.moe-a:8476"
    said = []
    for index in range(slices * hosts):
        place = {"MOE_SLICE": str(index // hosts), "JOB_COMPLETION_INDEX": str(index % hosts)}
        command = [shell, flag, script.replace("$$", "$")]  # as Kubernetes does
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        said.append(subprocess.run(command, env=path | place, check=True, capture_output=True, text=True).stdout)
    assert said == [f"{index} {' '.join(JOB.command[1:])}\n" for index in range(slices * hosts)]


def test_every_exit_status_has_its_rule():
    (replicated,) = MANIFESTS["gke-tpu"]["spec"]["replicatedJobs"]
    first, second, third = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (first["action"], second["action"], third["action"]) == ("FailJob", "Ignore", "Ignore")
    assert {0, *first["onExitCodes"]["values"]} == set(exits.FINAL)
    assert second["onExitCodes"]["values"] == [exits.AGAIN]
    assert first["onExitCodes"]["values"] == sorted(first["onExitCodes"]["values"])  # Kubernetes wants them in order
    assert first["onExitCodes"]["containerName"] == container("gke-tpu")["name"]


@pytest.mark.parametrize("kind", LABELS)
def test_pods_share_the_chips_of_every_slice(kind):
    for shape in shapes(CHIPS[kind]) if CHIPS[kind].platform == "tpu" else [(1, 8), (4, 4)]:
        topology = parse(f"{kind}:{'x'.join(map(str, shape))}")
        found = pods(topology)
        assert found.hosts * found.chips * CHIPS[kind].devices == topology.num_devices


@pytest.mark.parametrize(
    "change, said",
    [
        ({"name": "Moe"}, "name = 'Moe': must be small letters"),
        ({"name": "9a"}, "name = '9a': must be small letters"),
        ({"name": "a" * 48}, "may have 63"),
        ({"slices": "v5p:3x3x3"}, "is no slice of v5p; the nearest are"),
        ({"slices": "v9:2x2"}, "must be one of v4"),
        ({"slices": "2*v5p:2x2x1"}, "GKE joins only slices of several hosts"),
        ({"slices": "2*h200:2x8"}, "GPUs are one slice"),
        ({"slices": "v6e:4x4", "chips_per_host": 8}, "chips_per_host = 8: hosts of v6e:4x4 have 4"),
        ({"image": ""}, "image = '': must be the name"),
        ({"claim": ""}, "claim = '': must be small letters"),
        ({"port": 80}, "port = 80: must be from 1024"),
        ({"mount": "runs"}, "mount = 'runs': must be an absolute path"),
        ({"env": ("A",)}, "env.0 (not shown): must be NAME=VALUE"),
        ({"env": ("A=1", "A=2")}, "env.0 = A=...: A is given twice"),
        ({"env": ("MOE_COORDINATOR=a:1",)}, "is set by launch.submit"),
    ],
)
def test_mistakes_of_gke_are_one_line(change, said):
    with pytest.raises(ConfigError) as caught:
        check(dataclasses.replace(GKE, **change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"accelerator_type": "v6e-12"}, "is no slice; the nearest are v6e-1, v6e-4, v6e-8, v6e-16"),
        ({"accelerator_type": "tpu7x-16"}, "must be TYPE-NUMBER"),
        ({"nodes": 0}, "nodes = 0: must be at least 1"),
        ({"zone": "europe-west4"}, "must be a zone"),
        ({"spot": True, "reserved": True}, "give one of the two"),
        ({"share": "/runs"}, "must be HOST:/EXPORT"),
        ({"python": "3"}, "python = '3': must be a version"),
        ({"secrets": ("HF_TOKEN=hf token",)}, "secrets.0 (not shown): must be NAME=SECRET"),
    ],
)
def test_mistakes_of_tpu_vms_are_one_line(change, said):
    with pytest.raises(ConfigError) as caught:
        check(dataclasses.replace(VM, **change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", [GKE, VM])
@pytest.mark.parametrize("field", ["env", "secrets"])
@pytest.mark.parametrize("word", ["HF_TOKEN=hf_s3cr3t/", "hf_s3cr3t/", "WANDB_API_KEY=hf_s3cr3t/"])
def test_a_secret_is_refused_without_being_repeated(backend, field, word):
    with pytest.raises(ConfigError) as caught:
        check(dataclasses.replace(backend, **{field: (word,)}))
    assert "s3cr3t" not in str(caught.value) and str(caught.value).startswith(f"{field}.0")


@pytest.mark.parametrize("backend, devices", [(GKE, 8), (MULTISLICE, 32), (GPU, 16), (VM, 16), (VMS, 32)])
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(backend, devices):
    with pytest.raises(ConfigError, match=f"must multiply to the {devices} devices"):
        backend.actions(dataclasses.replace(JOB, words=("--mesh.data", "3", "--batch-size", "48")))


def test_a_batch_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ConfigError, match="batch_size = 8: a micro-batch of 4 sequences must be divisible by"):
        VM.actions(dataclasses.replace(JOB, words=("--batch-size", "8")))


@pytest.mark.parametrize("backend", [GKE, VM])
@pytest.mark.parametrize("workdir", ["gs://bucket/a", "runs/a", "/mnt/runs", "/mnt/runs/../a", "/tmp/a"])
def test_a_workdir_that_ends_with_its_host_is_refused(backend, workdir):
    with pytest.raises(ConfigError, match="must be below /mnt/runs"):
        backend.actions(dataclasses.replace(JOB, workdir=workdir))


def test_devices_of_a_tpu_vm_are_its_chips():
    types = ("v4-32", "v5p-32", "v5litepod-16", "v6e-16")
    assert {name.split("-")[0] for name in types} == set(FAMILIES)
    assert [dataclasses.replace(VM, accelerator_type=name).devices for name in types] == [16] * 4


@pytest.mark.parametrize("kind", [GkeConfig, TpuVmConfig])
def test_no_field_hides_one_of_the_run(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert not names & {field.name for field in dataclasses.fields(RunConfig)}
