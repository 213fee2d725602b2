"""The roll call: who is told what when one is missing, comes twice or holds something else. Threads play processes."""

import socket
import threading
from collections.abc import Mapping

import pytest

from moe.cluster.place import Place
from moe.cluster.roll_call import Absent, roll_call
from moe.config import ConfigError
from tests.multiprocess.together import free_port

FACTS = {"code": "abc", "config steps": "20"}


def call(
    of: Mapping[int, int],
    facts: Mapping[int, Mapping[str, str]] | None = None,
    errors: Mapping[int, str] | None = None,
    hosts: tuple[str, ...] = (),
    timeout_s: float = 10.0,
) -> dict[int, object]:
    """What each process ends with; `of` says how many processes each believes in."""
    port, ends = free_port(), {}

    def one(process: int) -> None:
        place = Place(
            coordinator=f"127.0.0.1:{port}",
            num_processes=of[process],
            process_id=process,
            found_by="a test",
            hosts=hosts,
        )
        try:
            ends[process] = roll_call(place, (facts or {}).get(process, FACTS), timeout_s, (errors or {}).get(process))
        except (ConfigError, Absent) as error:
            ends[process] = error

    threads = [threading.Thread(target=one, args=(process,)) for process in of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(ends) == set(of), "somebody hangs"
    return ends


def the_one_error(ends: Mapping[int, object], kind: type[Exception]) -> str:
    """The message, which must be the same on every process."""
    assert {type(end) for end in ends.values()} == {kind}, ends
    (said,) = {str(end) for end in ends.values()}
    return said


def test_all_there_and_alike() -> None:
    host = socket.gethostname()
    assert call({0: 3, 1: 3, 2: 3}) == dict.fromkeys(range(3), (host,) * 3)


def test_a_missing_process_is_named_with_its_host() -> None:
    said = the_one_error(call({0: 3, 1: 3}, hosts=("n1", "n2", "n3"), timeout_s=1), Absent)
    assert "process 2 (host n3) of 3 did not come within 1 s (cluster.start_timeout_s)" in said
    assert "there: process 0" in said and "and process 1" in said


def test_a_missing_first_process_is_named_by_every_other() -> None:
    ends = call({1: 3, 2: 3}, hosts=("n1", "n2", "n3"), timeout_s=1)
    for process, end in ends.items():
        assert isinstance(end, Absent)
        assert str(end).startswith(f"process {process} (host") and "process 0 (host n1) of 3 did not answer" in str(end)


def test_another_number_of_processes() -> None:
    said = the_one_error(call({0: 2, 1: 3, 2: 3}), ConfigError)
    assert said.startswith("num_processes: 2 on process 0") and "a test, and 3 on process" in said


def test_what_differs_is_named_with_both_values_and_processes() -> None:
    facts = {1: FACTS | {"config steps": "30"}, 2: {"config steps": "20"}}
    said = the_one_error(call({0: 3, 1: 3, 2: 3}, facts), ConfigError)
    assert said.startswith("the processes differ in code: abc on process 0")
    assert "nothing on process 2" in said and "; config steps: 20 on process 0" in said and "30 on process 1" in said


def test_a_mistake_of_one_is_told_to_all() -> None:
    said = the_one_error(call({0: 3, 1: 3, 2: 3}, errors={2: "workdir = 'x': is a file"}), ConfigError)
    assert said.startswith("process 2 (host ") and said.endswith("): workdir = 'x': is a file")


def test_a_mistake_of_the_first_is_told_to_all() -> None:
    assert "): no" in the_one_error(call({0: 2, 1: 2}, errors={0: "no"}), ConfigError)


def test_a_process_twice() -> None:
    port, ends = free_port(), []

    def one(process: int) -> None:
        try:
            roll_call(Place(coordinator=f"127.0.0.1:{port}", num_processes=3, process_id=process), FACTS, 10)
        except ConfigError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=one, args=(process,)) for process in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(ends) == 3 and all(end.startswith("process_id = 1: is on host") for end in ends)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"cannot listen there \(Address already in use.*name another port"):
            roll_call(Place(coordinator=coordinator, num_processes=2, process_id=0), FACTS, 0.3)


def test_something_else_at_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            for _ in range(3):
                connection, _ = other.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        threading.Thread(target=answer, daemon=True).start()
        coordinator = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Absent, match="something else than process 0 of this run answers at 127"):
            roll_call(Place(coordinator=coordinator, num_processes=2, process_id=1), FACTS, 0.2)


def test_nonsense_and_silence_at_the_port_do_not_stop_the_roll_call() -> None:
    port = free_port()
    place = Place(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=0)
    ends: list[object] = []
    first = threading.Thread(target=lambda: ends.append(roll_call(place, FACTS, 20)))
    first.start()
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"process": "x"}\n'):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(noise)
                break
            except ConnectionRefusedError:
                continue
    ends.append(roll_call(Place(coordinator=place.coordinator, num_processes=2, process_id=1), FACTS, 20))
    first.join(timeout=30)
    assert len(ends) == 2 and ends[0] == ends[1]
