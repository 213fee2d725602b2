"""Where a process finds its place: what each scheduler tells, and what is refused."""

import pytest

from launch import places
from moe.config import ConfigError

OURS = {"MOE_COORDINATOR": "n1:1234", "MOE_NUM_PROCESSES": "4", "MOE_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4099", "SLURM_STEP_NODELIST": "gpu[08-10]", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "job-0,job-1", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first:8080"}


@pytest.mark.parametrize(
    ("environment", "coordinator", "processes", "process"),
    [
        (OURS, "n1:1234", 4, 3),
        # 4099 is 3 beyond 2^12, and the last 2^12 ports begin at 61440.
        (SLURM, "gpu08:61443", 5, 4),
        (SLURM | OURS, "n1:1234", 4, 3),
        # 1531576320 / 2^12 = 373920 = 91 * 2^12 + 1184
        (MPI, "10.96.0.1:62624", 2, 1),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:43370"}, "[fe80::1]:61441", 2, 1),
        (GKE, "job-0:8482", 2, 1),
        (GKE | SLICES, "first:8482", 6, 5),
    ],
)
def test_what_a_scheduler_tells(environment: dict[str, str], coordinator: str, processes: int, process: int) -> None:
    place = places.find({}, environment)
    assert place is not None
    assert (place.coordinator, place.num_processes, place.process_id) == (coordinator, processes, process)


def test_the_command_line_comes_first() -> None:
    place = places.find({"coordinator": "a:1", "processes": "2", "process": "0"}, OURS)
    assert place is not None and place.coordinator == "a:1"


def test_slurm_tells_the_host_of_every_process() -> None:
    place = places.find({}, SLURM)
    assert place is not None and place.hosts == ("gpu08", "gpu08", "gpu09", "gpu09", "gpu10")
    assert place.name(4) == "process 4 (host gpu10)"


@pytest.mark.parametrize(
    "environment",
    [
        {"TPU_SKIP_MDS_QUERY": "1"},
        OURS | {"MOE_NUM_PROCESSES": "1", "MOE_PROCESS_ID": "0"},
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # the batch script, no step
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    ],
)
def test_alone(environment: dict[str, str]) -> None:
    assert places.find({}, environment) is None


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ({}, {"MOE_COORDINATOR": "a:1"}, "MOE_NUM_PROCESSES is missing"),
        ({"process": "1"}, {}, "--coordinator is missing"),
        ({}, OURS | {"MOE_PROCESS_ID": "4"}, r"process_id = 4, from MOE_\*: must be from 0 to num_processes - 1 = 3"),
        ({}, OURS | {"MOE_NUM_PROCESSES": "four"}, "MOE_NUM_PROCESSES = 'four': must be a number"),
        ({}, OURS | {"MOE_COORDINATOR": "n1"}, "coordinator = 'n1', from .*: must be HOST:PORT"),
        ({}, OURS | {"MOE_COORDINATOR": "n1:70000"}, "port from 1 to 65535"),
        ({"coordinator": "a:1", "processes": "2", "process": "-1"}, {}, "--process = '-1': must be a number"),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "MOE_COORDINATOR is missing: Open MPI"),
    ],
)
def test_refused(flags: dict[str, str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        places.find(flags, environment)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("node1", ["node1"]),
        ("node1,host2", ["node1", "host2"]),
        ("node[001-003],host2", ["node001", "node002", "node003", "host2"]),
        ("a[1,09-10]b", ["a1b", "a09b", "a10b"]),
    ],
)
def test_node_lists(nodes: str, hosts: list[str]) -> None:
    assert places.expand(nodes) == hosts
