"""Which of a run's processes this one is."""

import dataclasses
import socket
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One process among several; whoever started it says which (`launch.places`)."""

    coordinator: str
    """HOST:PORT of process 0, reachable from every host; the port must be free there."""
    num_processes: int
    process_id: int
    found_by: str = "arguments"
    """Where this was read from, for messages."""
    hosts: tuple[str, ...] = ()
    """The host of every process, in order, where the scheduler tells: with it a missing process has a name."""

    def problems(self) -> Iterator[tuple[str, str]]:
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            yield "coordinator", "must be HOST:PORT with a port from 1 to 65535"
        if self.num_processes < 1:
            yield "num_processes", "must be at least 1"
        if not 0 <= self.process_id < self.num_processes:
            yield "process_id", f"must be from 0 to num_processes - 1 = {self.num_processes - 1}"

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    def name(self, process: int, seen: str | None = None) -> str:
        """'process 3 (host n2)', with the host that it said itself or that the scheduler told."""
        host = seen or (self.hosts[process] if process < len(self.hosts) else None)
        return f"process {process}" + (f" (host {host})" if host else "")


def here() -> str:
    """The name of this host."""
    return socket.gethostname()
