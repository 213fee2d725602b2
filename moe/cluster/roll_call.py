"""All processes report to process 0 before any of them joins JAX's coordination service.

That service ends every process that waited in vain with SIGABRT and a C++ stack, and names nobody (measured, jax 0.10.2
and 0.12). So process 0 first listens at the coordinator's port itself, hears who is there and what each holds (config,
code, versions), and tells everyone the same verdict. One line of JSON each way; milliseconds once all are there.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from moe.cluster.place import Place, here
from moe.config import ConfigError

_RETRY_S = 0.1
_LINGER_S = 2.0
"""Seconds that a failed roll call is still answered: others may come a moment later, with the same mistake."""
_SILENCE_S = 5.0
"""Seconds that somebody who came is waited for; the others wait meanwhile."""
_LINE_LIMIT = 1 << 22
_SHOWN = 4

Facts = Mapping[str, str]


class Absent(RuntimeError):
    """Some process did not come, or went away, within the time that the config gives it."""


def roll_call(place: Place, facts: Facts, timeout_s: float, error: str | None = None) -> tuple[str, ...]:
    """Returns the host of every process, once all are there and hold the same `facts`.

    A process that failed before calls with its `error`: then every process raises that. Raises, with the same message
    on every process: ConfigError for another number of processes, a process twice, facts that differ; Absent for
    processes that did not come within `timeout_s`, by name. A port that is taken is process 0's ConfigError alone.
    """
    hello = {
        "process": place.process_id,
        "of": place.num_processes,
        "host": here(),
        "facts": dict(facts),
        "error": error,
    }
    verdict = _listen(place, hello, timeout_s) if place.process_id == 0 else _report(place, hello, timeout_s)
    if "mistake" in verdict:
        raise ConfigError(verdict["mistake"])
    if "absent" in verdict:
        raise Absent(verdict["absent"])
    return tuple(verdict["hosts"])


def compare(place: Place, facts: Mapping[int, Facts], hosts: Mapping[int, str]) -> str | None:
    """What the processes do not agree about, named with each one's value; None if they do."""
    said = []
    for key in sorted(set().union(*facts.values())):
        values = {process: of.get(key, "nothing") for process, of in sorted(facts.items())}
        if len(set(values.values())) > 1:
            groups: dict[str, list[int]] = {}
            for process, value in values.items():
                groups.setdefault(value, []).append(process)
            said.append(
                f"{key}: " + ", ".join(f"{value} on {_names(place, who, hosts)}" for value, who in groups.items())
            )
    if not said:
        return None
    more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return f"the processes differ in {'; '.join(said[:_SHOWN])}{more}"


def _names(place: Place, processes: list[int], hosts: Mapping[int, str]) -> str:
    shown = [place.name(process, hosts.get(process)) for process in processes[:_SHOWN]]
    return " and ".join(shown) + (f" and {len(processes) - _SHOWN} more" if len(processes) > _SHOWN else "")


def _judge(place: Place, hellos: list[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """The verdict on all hellos that came."""
    hosts = {hello["process"]: hello["host"] for hello in hellos}
    failed = [f"{place.name(h['process'], h['host'])}: {h['error']}" for h in hellos if h["error"] is not None]
    if failed:
        return {"mistake": "; ".join(failed[:_SHOWN])}
    wrong = [h for h in hellos if h["of"] != place.num_processes]
    if wrong:
        other = wrong[0]
        return {
            "mistake": f"num_processes: {place.num_processes} on {place.name(0, here())}, which found it in"
            f" {place.found_by}, and {other['of']} on {place.name(other['process'], other['host'])}"
        }
    taken: dict[int, str] = {}
    for hello in hellos:
        if hello["process"] in taken:
            return {
                "mistake": f"process_id = {hello['process']}: is on host {taken[hello['process']]} and on host"
                f" {hello['host']}; every process needs its own, from 0 to {place.num_processes - 1}"
            }
        taken[hello["process"]] = hello["host"]
    if missing := [process for process in range(place.num_processes) if process not in taken]:
        return {
            "absent": f"{_names(place, missing, {})} of {place.num_processes} did not come within"
            f" {timeout_s:g} s (cluster.start_timeout_s) to {place.coordinator}; there:"
            f" {_names(place, sorted(taken), hosts)}"
        }
    if differs := compare(place, {h["process"]: h["facts"] for h in hellos}, hosts):
        return {"mistake": differs}
    return {"hosts": [taken[process] for process in range(place.num_processes)]}


def _listen(place: Place, mine: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Process 0: hears the others, judges, answers each."""
    deadline = time.monotonic() + timeout_s
    hellos, waiting = [mine], []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_open(place, deadline))
        while not _complete(place, hellos) and (left := deadline - time.monotonic()) > 0:
            if (heard := _hear(server, left)) is not None:
                hello, connection = heard
                stack.enter_context(connection)
                hellos.append(hello)
                waiting.append(connection)
        verdict = _judge(place, hellos, timeout_s)
        for connection in waiting:
            _answer(connection, verdict)
        if "hosts" not in verdict:
            _linger(server, verdict)
    return verdict


def _complete(place: Place, hellos: list[dict[str, Any]]) -> bool:
    """Whether nothing is to be gained by waiting: all are there, or one says something that cannot be."""
    odd = any(hello["error"] is not None or hello["of"] != place.num_processes for hello in hellos)
    return odd or len(hellos) >= place.num_processes


def _linger(server: socket.socket, verdict: dict[str, Any]) -> None:
    end = time.monotonic() + _LINGER_S
    while (left := end - time.monotonic()) > 0:
        if (heard := _hear(server, left)) is not None:
            with heard[1] as connection:
                _answer(connection, verdict)


def _hear(server: socket.socket, left: float) -> tuple[dict[str, Any], socket.socket] | None:
    """The next one's hello, and where it waits for an answer; None if nobody came, or one who is none of ours."""
    server.settimeout(left)
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        try:
            connection.settimeout(min(left, _SILENCE_S))
            return _hello(_read(connection)), connection
        except (OSError, ValueError):  # it said nothing, or nonsense
            connection.close()
    return None


def _open(place: Place, deadline: float) -> socket.socket:
    """Listens at the coordinator's port; a port in use may come free as an earlier start of the run dies."""
    _, port = place.address
    both = socket.has_dualstack_ipv6()
    while True:
        try:
            if both:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
            return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"coordinator = {place.coordinator}: process 0 (host {here()}) cannot listen there"
                    f" ({error.strerror}); name another port or end what uses it"
                ) from error
        time.sleep(_RETRY_S)


def _report(place: Place, hello: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Every other process: says hello, waits for the verdict."""
    deadline = time.monotonic() + timeout_s
    me, zero = place.name(place.process_id, here()), place.name(0)
    while True:
        try:
            with socket.create_connection(
                place.address, timeout=max(deadline - time.monotonic(), _RETRY_S)
            ) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                # Process 0 may have started to wait after this one did.
                connection.settimeout(timeout_s + 5)
                verdict = _read(connection)
                if verdict.keys() & {"hosts", "mistake", "absent"}:
                    return verdict
                raise ValueError
        except (ValueError, TimeoutError) as error:
            refused = f"{me}: something else than process 0 of this run answers at {place.coordinator}"
            if time.monotonic() > deadline:
                raise Absent(f"{refused}, or it ended; see its log") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise Absent(
                    f"{me}: {zero} of {place.num_processes} did not answer at {place.coordinator} within"
                    f" {timeout_s:g} s (cluster.start_timeout_s): {error.strerror or error}"
                ) from error
        time.sleep(_RETRY_S)


def _read(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON; ValueError for anything else."""
    with connection.makefile("rb") as lines:
        data = json.loads(lines.readline(_LINE_LIMIT))
    if not isinstance(data, dict):
        raise ValueError("not an object")
    return data


def _hello(data: dict[str, Any]) -> dict[str, Any]:
    """A hello with the types that it must have; ValueError otherwise."""
    ok = (
        isinstance(data.get("process"), int) and isinstance(data.get("of"), int) and isinstance(data.get("facts"), dict)
    )
    if not ok or not isinstance(data.get("host"), str) or not isinstance(data.get("error"), (str, type(None))):
        raise ValueError("not a hello")
    return data


def _answer(connection: socket.socket, verdict: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it went away in the meantime: the next wait will show it
        connection.sendall(json.dumps(verdict).encode() + b"\n")
