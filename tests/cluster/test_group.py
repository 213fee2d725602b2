"""Agreeing after the roll call, over a key-value store that threads share in place of JAX's."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest

from moe.cluster import group as module
from moe.cluster.config import ClusterConfig
from moe.cluster.group import Group
from moe.cluster.place import Place
from moe.cluster.roll_call import Absent
from moe.config import ConfigError


class Full(Exception):
    """Something else than a mistake."""


class Store:
    """As JAX's: set once, read with patience in milliseconds."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.when: dict[str, float] = {}

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.values, f"{key} is set twice"
        self.when[key] = time.monotonic()
        self.values[key] = value

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        end = time.monotonic() + timeout_ms / 1000
        while key not in self.values:
            if time.monotonic() > end:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.001)
        return self.values[key]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(module, "_client", lambda: found)
    return found


def together(act: Callable[[int, Group], Any], processes: int = 3, timeout_s: int = 20) -> list[Any]:
    """What `act(process, group)` returns or raises in every process."""
    ends: list[Any] = [None] * processes

    def one(process: int) -> None:
        place = Place(coordinator="n0:1", num_processes=processes, process_id=process)
        hosts = tuple(f"n{index}" for index in range(processes))
        try:
            ends[process] = act(process, Group(place, hosts, ClusterConfig(agree_timeout_s=timeout_s)))
        except (ConfigError, Absent, Full) as error:
            ends[process] = error

    threads = [threading.Thread(target=one, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return ends


def test_each_keeps_what_it_made(store: Store) -> None:
    def act(process: int, group: Group) -> tuple[int, int]:
        first = group.agree("a", lambda: process, lambda _: {"same": "yes"})
        return first, group.agree("b", lambda: 10 * process)

    assert together(act) == [(0, 0), (1, 10), (2, 20)]


def test_facts_that_differ_are_named_on_every_process(store: Store) -> None:
    ends = together(lambda process, group: group.agree("a", lambda: process, lambda made: {"data": str(made // 2)}))
    assert {str(end) for end in ends} == {
        "the processes differ in data: 0 on process 0 (host n0) and process 1 (host n1), 1 on process 2 (host n2)"
    }


def test_a_mistake_of_one_is_raised_by_all_with_its_name(store: Store) -> None:
    def make(process: int) -> None:
        if process == 1:
            raise ConfigError("workdir = 'x': is a file")

    ends = together(lambda process, group: group.agree("a", lambda: make(process)))
    assert [str(end) for end in ends] == ["process 1 (host n1): workdir = 'x': is a file"] * 3


def test_an_error_of_another_kind_keeps_its_kind(store: Store) -> None:
    def make(process: int) -> None:
        if process == 2:
            raise Full("no space")

    ends = together(lambda process, group: group.agree("a", lambda: make(process), raises=(ConfigError, Full)))
    assert {type(end) for end in ends} == {Full} and {str(end) for end in ends} == {"process 2 (host n2): no space"}


def test_a_mistake_that_all_make_is_said_without_a_name(store: Store) -> None:
    def make() -> None:
        raise ConfigError("steps = 0: must be at least 1")

    ends = together(lambda process, group: group.agree("a", make))
    assert [str(end) for end in ends] == ["steps = 0: must be at least 1"] * 3


def test_process_0_ends_last_after_a_mistake(store: Store) -> None:
    """It holds the coordination service, whose end aborts the others before they have said why."""
    ended = {}

    def act(process: int, group: Group) -> None:
        try:
            group.agree("a", lambda: None, lambda _: {"data": str(process)})
        finally:
            ended[process] = time.monotonic()

    together(act)
    heard = [when for key, when in store.when.items() if "/heard/" in key]
    assert len(heard) == 2 and ended[0] >= max(heard) + module._LAST_S


def test_one_first(store: Store) -> None:
    order = []

    def make(process: int) -> None:
        if process == 0:
            time.sleep(0.1)
        order.append(process)

    together(lambda process, group: group.agree("a", lambda: make(process), one_first=True))
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_a_mistake_of_the_first_spares_the_others_the_work(store: Store) -> None:
    def make(process: int) -> None:
        assert process == 0, "the others must not begin what process 0 could not do"
        raise ConfigError("no space")

    ends = together(lambda process, group: group.agree("a", lambda: make(process), one_first=True))
    assert [str(end) for end in ends] == ["process 0 (host n0): no space"] * 3


def test_who_is_not_done_in_time_is_named(store: Store) -> None:
    def act(process: int, group: Group) -> None:
        if process != 1:
            group.agree("the data", lambda: None)

    ends = together(act, timeout_s=1)
    assert str(ends[0]).startswith(
        "process 1 (host n1) was not done with the data within 1 s (cluster.agree_timeout_s)"
    )
    assert isinstance(ends[2], Absent)


def test_alone() -> None:
    assert Group().agree("a", lambda: 3) == 3
    with pytest.raises(ConfigError, match="no"):
        Group().agree("a", lambda: (_ for _ in ()).throw(ConfigError("no")))
