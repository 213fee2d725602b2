"""The processes of one run, once they are joined: doing one thing together, and failing together.

    group = join(place, config, facts)
    corpus = group.agree("the data", prepare, lambda corpus: {"fingerprint": corpus.fingerprint}, one_first=True)

Between `join` and `leave` a process must not end alone by a normal exit: JAX would wait there for the others, and they
for it. Whoever fails ends by `os._exit` (`launch.train`).
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from moe.cluster.config import ClusterConfig
from moe.cluster.place import Place, here
from moe.cluster.roll_call import Absent, Facts, compare, roll_call
from moe.config import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")
_LAST_S = 1.0
"""Seconds that process 0 leaves the others, once they know the mistake, to say it and end."""


def _no_facts(_: Any) -> Facts:
    return {}


class Group:
    """The processes of a run; alone, everything is done at once and agrees with itself."""

    def __init__(self, place: Place | None = None, hosts: tuple[str, ...] = (), config: ClusterConfig | None = None):
        self._place, self._hosts, self._config = place, hosts, config or ClusterConfig()
        self._count = 0

    @property
    def alone(self) -> bool:
        return self._place is None

    def name(self, process: int) -> str:
        """'process 3 (host n2)'."""
        return f"process {process}" if self._place is None else self._place.name(process, self._hosts[process])

    def agree(
        self,
        what: str,
        make: Callable[[], T],
        facts: Callable[[T], Facts] = _no_facts,
        *,
        one_first: bool = False,
        raises: tuple[type[Exception], ...] = (ConfigError,),
    ) -> T:
        """`make()` of every process, once all have made it and `facts` of what they made are the same.

        `one_first`: process 0 makes it before the others begin, for what it leaves on a shared disk. An error of one of
        the types `raises` in one process is raised by all, with its name; ConfigError also for facts that differ.
        Raises Absent for processes that are not done within `cluster.agree_timeout_s`.
        """
        if self._place is None:
            return make()
        self._count += 1
        key = f"moe/agree/{self._count}"
        me = self._place.process_id
        # What process 0 says is judged below, with all the others; what it could not do they need not try.
        given_up = one_first and me != 0 and self._get(f"{key}/0", 0, what)["error"] is not None
        error, kind, made, held = None, 0, None, {}
        try:
            if not given_up:
                made = make()
                held = dict(facts(made))
        except raises as found:
            error, kind = str(found), next(i for i, one in enumerate(raises) if isinstance(found, one))
        _client().key_value_set(f"{key}/{me}", json.dumps({"error": error, "kind": kind, "facts": held}))
        verdict = self._judge(key, what) if me == 0 else self._get(f"{key}/verdict", 0, what)
        if verdict["error"] is not None:
            self._acknowledge(key)
            raise raises[verdict["kind"]](verdict["error"]) if verdict["kind"] >= 0 else ConfigError(verdict["error"])
        return made  # type: ignore[return-value]

    def leave(self) -> None:
        """Waits until every process has come this far, then takes leave of JAX's coordination service."""
        if self._place is not None:
            jax.distributed.shutdown()

    def _judge(self, key: str, what: str) -> Mapping[str, Any]:
        assert self._place is not None
        found = {process: self._get(f"{key}/{process}", process, what) for process in range(self._place.num_processes)}
        said = {process: one["error"] for process, one in found.items() if one["error"] is not None}
        if said:
            same = len(set(said.values())) == 1 and len(said) == len(found)
            first = min(said)
            error = said[first] if same else f"{self.name(first)}: {said[first]}"
            verdict = {"error": error, "kind": found[first]["kind"]}
        else:
            hosts = dict(enumerate(self._hosts))
            differ = compare(self._place, {process: one["facts"] for process, one in found.items()}, hosts)
            verdict = {"error": differ, "kind": -1}
        _client().key_value_set(f"{key}/verdict", json.dumps(verdict))
        return verdict

    def _acknowledge(self, key: str) -> None:
        """Process 0 holds the service, whose end would abort the others before they have said why: it ends last."""
        assert self._place is not None
        if self._place.process_id != 0:
            _client().key_value_set(f"{key}/heard/{self._place.process_id}", "yes")
            return
        end = time.monotonic() + 5
        for process in range(1, self._place.num_processes):
            left = max(1, int(1000 * (end - time.monotonic())))
            try:
                _client().blocking_key_value_get(f"{key}/heard/{process}", left)
            except jax.errors.JaxRuntimeError:
                log.warning("%s does not answer any more", self.name(process))
        time.sleep(_LAST_S)

    def _get(self, key: str, process: int, what: str) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = json.loads(
                _client().blocking_key_value_get(key, int(1000 * self._config.agree_timeout_s))
            )
        except jax.errors.JaxRuntimeError as error:
            raise Absent(
                f"{self.name(process)} was not done with {what} within {self._config.agree_timeout_s} s"
                f" (cluster.agree_timeout_s): {str(error).splitlines()[0]}"
            ) from error
        return found


def join(place: Place | None, config: ClusterConfig, facts: Facts) -> Group:
    """The roll call, then JAX's coordination service; before anything asks for a device."""
    if place is None or place.num_processes == 1:
        return Group()
    hosts = roll_call(place, facts, config.start_timeout_s)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        initialization_timeout=config.start_timeout_s,
        heartbeat_timeout_seconds=config.heartbeat_timeout_s,
        shutdown_timeout_seconds=config.agree_timeout_s,
    )
    log.info("process %d of %d (host %s), found by %s", place.process_id, place.num_processes, here(), place.found_by)
    group = Group(place, hosts, config)

    def devices() -> list[jax.Device]:
        return jax.local_devices()

    def counted(found: list[jax.Device]) -> Facts:
        return {"devices": f"{len(found)} x {found[0].device_kind}"}

    group.agree("its devices", devices, counted)
    return group


def _client() -> Any:
    # JAX has no public door to its key-value store; Orbax goes through this one too.
    from jax._src import distributed

    return distributed.global_state.client
