"""Which of a run's processes this one is, as the scheduler that started it tells in the environment.

Asked in this order: MOE_COORDINATOR, MOE_NUM_PROCESSES, MOE_PROCESS_ID (what `launch.submit` sets); a step of SLURM
(`srun`); Open MPI (`mpirun`); a TPU slice or several, on GKE or on TPU VMs.
"""

import re
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from moe.cluster.place import Place
from moe.config import ConfigError

Environment = Mapping[str, str]

OURS = ("MOE_COORDINATOR", "MOE_NUM_PROCESSES", "MOE_PROCESS_ID")
FLAGS = ("coordinator", "processes", "process")
"""Options of `launch.train` that say the same by hand."""
_TPU_PORT = 8482
_EPHEMERAL = 1 << 12
"""Ports that a job number chooses among: the last ones, as JAX does."""


def find(flags: Mapping[str, str], environment: Environment) -> Place | None:
    """This process's place; None if it is the only one. ConfigError for a place that cannot be."""
    place = _by_hand(flags, environment) or next(
        (found for reader in (_slurm, _open_mpi, _tpu) if (found := reader(environment)) is not None), None
    )
    if place is None:
        return None
    for field, limit in place.problems():
        raise ConfigError(f"{field} = {getattr(place, field)!r}, from {place.found_by}: {limit}")
    return place if place.num_processes > 1 else None


def _by_hand(flags: Mapping[str, str], environment: Environment) -> Place | None:
    given = {f"--{name}": flags[name] for name in FLAGS if name in flags}
    names: tuple[str, ...] = tuple(f"--{name}" for name in FLAGS)
    if not given:
        given, names = {name: environment[name] for name in OURS if name in environment}, OURS
    if not given:
        return None
    if missing := [name for name in names if name not in given]:
        raise ConfigError(
            f"{missing[0]} is missing: {', '.join(names)} belong together, and {next(iter(given))} is given"
        )
    coordinator, processes, process = (given[name] for name in names)
    return _place(coordinator, processes, process, "the command line" if names != OURS else "MOE_*", names[1:])


def _slurm(environment: Environment) -> Place | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in environment for name in names):  # in the batch script itself there is no step
        return None
    job, nodes, tasks, process = (environment[name] for name in names)
    hosts = expand(nodes)
    spread = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    by_process = tuple(host for host, count in zip(hosts, spread, strict=False) for _ in range(count))
    port = int(job) % _EPHEMERAL + 65536 - _EPHEMERAL
    found = _place(f"{hosts[0]}:{port}", tasks, process, "SLURM", names[2:])
    known = by_process if len(by_process) == found.num_processes else ()
    return Place(**(vars(found) | {"hosts": known}))


def expand(nodes: str) -> list[str]:
    """Names of a SLURM node list: 'a[01-03,7],b' is a01, a02, a03, a7, b."""
    found = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", nodes):
        for one in ranges.split(",") if ranges else [""]:
            first, _, last = one.partition("-")
            numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if last else [first]
            found += [f"{prefix}{number}{suffix}" for number in numbers]
    return found


def _tasks(spread: str) -> list[int]:
    """Tasks on each node: '2(x3),1' is 2, 2, 2, 1."""
    found = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", spread):
        found += [int(count)] * int(times or 1)
    return found


def _open_mpi(environment: Environment) -> Place | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if any(name not in environment for name in names):
        return None
    size, rank = (environment[name] for name in names)
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    told = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if told is None:
        if size == "1":
            return None
        raise ConfigError(
            "MOE_COORDINATOR is missing: Open MPI does not tell the first host here; set HOST:PORT with mpirun -x"
        )
    # The job number is a multiple of 2^12.
    port = int(told[1]) // _EPHEMERAL % _EPHEMERAL + 65536 - _EPHEMERAL
    return _place(f"{told[2] or f'[{told[3]}]'}:{port}", size, rank, "Open MPI", names)


def _tpu(environment: Environment) -> Place | None:
    """GKE tells every worker's name in the environment; a TPU VM is told by the metadata server."""
    tell: Callable[[str], str | None] = environment.get
    workers, worker = environment.get("TPU_WORKER_HOSTNAMES"), environment.get("TPU_WORKER_ID")
    if workers is None or worker is None:
        if "TPU_SKIP_MDS_QUERY" in environment or not _on_tpu_vm():
            return None
        ends = _metadata("worker-network-endpoints").split(",")
        workers = ",".join(end.split(":")[-1] for end in ends)  # either a name or name:number:address
        worker = _metadata("agent-worker-number")
        lines = dict(line.split(":", 1) for line in _metadata("tpu-env").splitlines() if ":" in line)
        tell = {key.strip(): value.strip().strip("'") for key, value in lines.items()}.get
    names = workers.split(",")
    slices, index = int(tell("MEGASCALE_NUM_SLICES") or 1), int(tell("MEGASCALE_SLICE_ID") or 0)
    first = (tell("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    return Place(
        coordinator=f"{first}:{_TPU_PORT}",
        num_processes=len(names) * slices,
        process_id=index * len(names) + int(worker),
        found_by="the TPU's metadata",
        hosts=tuple(names) if slices == 1 else (),
    )


def _on_tpu_vm() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _metadata(key: str) -> str:
    address = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())
    except OSError as error:
        raise ConfigError(
            f"the metadata server of this TPU VM does not tell {key} ({error}); set {', '.join(OURS)},"
            " or TPU_SKIP_MDS_QUERY=1 to use this host alone"
        ) from error


def _place(coordinator: str, processes: str, process: str, found_by: str, names: tuple[str, ...]) -> Place:
    for name, value in zip(names, (processes, process), strict=True):
        if not value.isdigit():
            raise ConfigError(f"{name} = {value!r}: must be a number")
    return Place(coordinator=coordinator, num_processes=int(processes), process_id=int(process), found_by=found_by)
