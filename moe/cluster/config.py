"""How long the processes of a run wait for each other."""

import dataclasses
from collections.abc import Iterator

from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How long the processes of a run wait for each other, and when they compare what they hold."""

    start_timeout_s: int = 300
    """Seconds that every process waits at the start until all are there."""
    heartbeat_timeout_s: int = 100
    """Seconds without a sign of life after which a process is taken for lost and the others end."""
    agree_timeout_s: int = 1800
    """Seconds that processes wait for one another while each opens data, workdir or checkpoint."""
    verify_after: int = 20
    """Steps after every start at which replicas of the state are compared; they are before every save too."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, start_timeout_s=1, heartbeat_timeout_s=1, agree_timeout_s=1, verify_after=1)
