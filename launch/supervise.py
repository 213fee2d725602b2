"""Start a group of processes as one run on this machine, and start it again when it was cut off:

    python -m launch.supervise --processes 2 --devices 4 --workdir DIR -- python -m launch.train CONFIG --workdir DIR

When one process ends badly the others get `grace_s` to end by themselves, then they are killed. What happens next says
the exit status (launch/exits.py): 0, 2, 3 and 74 end it with that status, 75 starts it again, anything else starts it
again after a wait, a bounded number of times without progress. SIGTERM, Ctrl-C or a lost terminal is passed on once as
SIGTERM, so that the run saves; exit status 75 (130 after Ctrl-C; a second Ctrl-C kills). Killed itself, it leaves no
process behind.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch import exits
from launch.restarts import End, RestartConfig, Restarts, most_telling, newest_step
from moe.config import ConfigError, at_least

USAGE = "usage: python -m launch.supervise [--processes N] [--devices M] [--workdir DIR] [...] -- COMMAND ..."
_POLL_S = 0.05
_TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(137); os.execvp(sys.argv[2], sys.argv[2:])"
)
"""Becomes the command after asking the kernel (PR_SET_PDEATHSIG) for SIGKILL when the supervisor dies: a supervisor
killed with -9 must not leave processes that write into a folder in which the next one starts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(RestartConfig):
    """Several processes of one run on this machine."""

    processes: int = 1
    """Processes of the run. One drives all real devices of this machine."""
    devices: int = 0
    """CPU devices that each process simulates; 0: the real ones."""
    gpus: int = 0
    """GPUs that each process sees, process 0 the first of them; 0: all there are. For several processes on a machine:
    one that drives all GPUs is the rule."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, processes=1, devices=0)
        yield from at_least(self, gpus=0)
        if self.devices and self.gpus:
            yield "gpus", f"must be 0 where devices are simulated, devices = {self.devices}"
        if self.processes > 1 and not self.devices + self.gpus:
            yield "processes", "one process drives all real devices of a machine; give devices (simulated) or gpus"

    def environment(self, index: int, port: int) -> dict[str, str]:
        """What process `index` needs to find the others and its devices. One process is told too that it is alone:
        inside an allocation of SLURM it would else look for the job's others."""
        place = {
            "MOE_COORDINATOR": f"127.0.0.1:{port}",
            "MOE_NUM_PROCESSES": str(self.processes),
            "MOE_PROCESS_ID": str(index),
        }
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        every = shown if shown != [""] else [str(gpu) for gpu in range(self.processes * self.gpus)]
        mine = every[index * self.gpus : (index + 1) * self.gpus]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if self.gpus else {}
        return place | visible | simulated(self.devices, self.processes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperviseConfig(GroupConfig):
    """A group of processes on this machine."""

    workdir: str
    """Folder of the run; a newer checkpoint in it is progress."""


def simulated(devices: int, processes: int) -> dict[str, str]:
    """The environment in which a process simulates `devices` devices on its CPU; empty for the real ones."""
    if not devices:
        return {}
    # Without other processes there is no client that gloo could meet them through.
    collectives = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"} if processes > 1 else {}
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | collectives


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass
class Signals:
    """The signal that asked this process to end, and how often Ctrl-C was pressed."""

    first: int | None = None
    interrupts: int = 0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignore SIGHUP
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self.interrupts += number == signal.SIGINT

    @property
    def status(self) -> int:
        return 128 + signal.SIGINT if self.first == signal.SIGINT else exits.AGAIN


class Group:
    """The processes of one start. Each leads a process group, so that Ctrl-C reaches them through the supervisor alone
    and so that what they started ends with them."""

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], output: int | None = None
    ) -> None:
        """`output`: file descriptor for what the processes say; None: where this one says it."""
        tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())] if sys.platform == "linux" else []
        self._started = [
            subprocess.Popen(
                [*tied, *command],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
            for environment in environments
        ]
        self.ends: list[End] = []
        """In the order in which they came."""

    def poll(self) -> bool:
        """Notes who has ended; True once all have."""
        for index, process in enumerate(self._started):
            # Not process.poll(): its id must stay taken until all that it started is gone too.
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if process.returncode is None and os.waitid(os.P_PID, process.pid, flags) is not None:
                code = self._end(process)
                self.ends.append(End(index, code if code >= 0 else 128 - code))
        return all(process.returncode is not None for process in self._started)

    def send(self, number: int) -> None:
        for process in self._started:
            if process.returncode is None:
                os.kill(process.pid, number)

    def kill(self) -> list[int]:
        """Ends whatever is left; which processes had to be killed."""
        left = [index for index, process in enumerate(self._started) if process.returncode is None]
        for index in left:
            self._end(self._started[index])
        return left

    @staticmethod
    def _end(process: "subprocess.Popen[bytes]") -> int:
        with contextlib.suppress(PermissionError):  # what macOS says of a group in which nobody lives
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def say(line: str) -> None:
    print(f"supervisor: {line}", file=sys.stderr, flush=True)


def wait_for(group: Group, signals: Signals, grace_s: float, *, quiet: bool = False) -> End:
    """Waits for a group to end, passes a signal on, kills who stays behind; returns the most telling end."""
    tell = (lambda line: None) if quiet else say
    told, deadline = False, float("inf")
    while not group.poll():
        if signals.first is not None and not told:
            told = True
            tell(f"{signal.Signals(signals.first).name}: the processes are asked to save and end")
            group.send(signal.SIGTERM)
        if deadline == float("inf") and any(end.status for end in group.ends):
            deadline = time.monotonic() + grace_s
        if signals.interrupts > 1 or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    ends = list(group.ends)  # those that were killed say nothing
    if left := group.kill():
        why = f"{grace_s:g} s after {most_telling(ends)}" if ends else "after a second Ctrl-C"
        tell(f"killed {', '.join(f'process {index}' for index in left)}, still running {why}")
    return most_telling(ends) if ends else End(left[0], 128 + signal.SIGKILL)


def supervise(
    config: RestartConfig, workdir: Path, start: Callable[[], Group], signals: Signals, pause: Callable[[float], None]
) -> int:
    """Starts a group again and again until it has ended for good; returns the exit status."""
    restarts = Restarts(newest=newest_step(workdir))
    while True:
        group = start()
        try:
            end = wait_for(group, signals, config.grace_s)
        finally:
            group.kill()
        decision = restarts.after(end, newest_step(workdir), config)
        if signals.first is not None and end.status not in exits.FINAL:
            say(f"{end}; not started again, as this supervisor was asked to end")
            return signals.status
        say(decision.line)
        if not decision.again:
            return end.status
        pause(decision.wait_s)
        if signals.first is not None:
            return signals.status


def main(words: list[str] | None = None) -> int:
    from launch.cli import one_line_errors, parse
    from moe.config import check

    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}" if words else f"error: {USAGE}", file=sys.stderr)
        return 0 if words else 2
    with one_line_errors():
        if "--" not in words or not words[words.index("--") + 1 :]:
            raise ConfigError(f"command: is missing; {USAGE}")
        split = words.index("--")
        config, command = parse(SuperviseConfig, words[:split], "python -m launch.supervise"), words[split + 1 :]
        check(config)
    signals = Signals()
    signals.listen()

    def start() -> Group:
        port = free_port()  # a new one each time: the old one may still be taken
        return Group(command, [config.environment(index, port) for index in range(config.processes)])

    def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        while signals.first is None and time.monotonic() < end:
            time.sleep(_POLL_S)

    return supervise(config, Path(config.workdir), start, signals, pause)


if __name__ == "__main__":
    sys.exit(main())
