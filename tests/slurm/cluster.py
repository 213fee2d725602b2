"""A real SLURM on this machine alone: munged, slurmctld and one slurmd, in a folder of their own.

    python -m tests.slurm.cluster        starts one, opens a shell in which sbatch and squeue reach it, ends it with it

Whoever starts it submits to it; installing it needs root. Nothing outside the folder is changed.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

INSTALL = Path(__file__).parent / "install.sh"
PROGRAMS = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
"""Daemons are not on everybody's path."""
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait={kill_wait}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(RuntimeError):
    """There is no SLURM here and there cannot be one; says why."""


def available() -> None:
    """Installs SLURM if it is missing and may be installed; Unavailable with the reason if it cannot be."""
    said = subprocess.run([INSTALL], env=os.environ | PROGRAMS, capture_output=True, text=True, check=False)
    if said.returncode:
        raise Unavailable(said.stdout.strip() or said.stderr.strip())


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2, kill_wait: int = 60) -> Iterator[dict[str, str]]:
    """A running SLURM; yields what its clients need in their environment."""
    folder = folder.absolute()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    # A job of more CPUs than the machine has is fine here: nothing is bound to a core.
    text = CONF.format(
        host=socket.gethostname(), user=getpass.getuser(), folder=folder, ports=_free_ports(2), cpus=cpus,
        kill_wait=kill_wait,
    )  # fmt: skip
    conf = folder / "slurm.conf"
    conf.write_text(text)
    environment = PROGRAMS | {"SLURM_CONF": str(conf)}
    socket_path = folder / "munge.socket"
    munged = ["munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("log", "pid", "seed")]
    commands = (munged, ["slurmctld", "-D", "-f", str(conf)], ["slurmd", "-D", "-f", str(conf)])
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as log:
                daemons.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment
                    )
                )
            if command is munged:
                _wait(socket_path.exists, "munged", folder)
        _wait(lambda: "idle" in _sinfo(environment), "the node", folder)
        yield environment
    finally:
        _end(daemons, environment)


def _sinfo(environment: dict[str, str]) -> str:
    words = ["sinfo", "--noheader", "--format=%t"]
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=False).stdout


def _wait(ready: Callable[[], bool], what: str, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"--- {log.name}\n{log.read_text()[-2000:]}" for log in [*folder.glob("*.log"), *folder.glob("*.out")]
            )
            raise RuntimeError(f"{what} of the test's SLURM is not there after {seconds} s\n{logs}")
        time.sleep(0.1)


def _end(daemons: "list[subprocess.Popen[bytes]]", environment: dict[str, str]) -> None:
    """Jobs first, so that no process of theirs outlives slurmd; then the daemons, last first."""
    if len(daemons) == 3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            words = ["scancel", "--full", "--signal=KILL", f"--user={os.getuid()}"]
            subprocess.run(words, env=os.environ | environment, check=False, timeout=20, capture_output=True)
            time.sleep(1)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def main() -> int:
    available()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with cluster(folder) as environment:
            print(f"SLURM is up in {folder}; leave the shell to end it", file=sys.stderr)
            return subprocess.run(
                [os.environ.get("SHELL", "bash")], env=os.environ | environment, check=False
            ).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
