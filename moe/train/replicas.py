"""Whether the devices that hold the same part of the state hold the same bits.

Nothing in a step compares them: a device that computes wrongly, or a collective that gave one device another sum, lets
replicas drift apart, and whichever of them is saved becomes the run. Every device hashes what it holds
(`moe.train.checksums`); the table [devices, leaves] goes to every host and is compared there.
"""

from collections import Counter
from typing import Any

import jax
import numpy as np

from moe.train.checksums import by_replica, names, table
from moe.train.failures import Diverged

_NAMED = 3
"""Parts of leaves that the message names; of the others it gives the number."""


def check_replicas(state: Any) -> None:
    """Diverged, on every process, naming leaf, devices and processes, if replicas of a shard differ in any bit.

    Every leaf lies on one mesh. Collectives: a gather of one uint32 a device and leaf. Waits for the state's values.
    """
    wrong = []
    for name, leaf, column in zip(names(state), jax.tree.leaves(state), table(state).T, strict=True):
        found = by_replica(leaf.sharding, column)
        if (found != found[0]).any():
            holders = by_replica(leaf.sharding, leaf.sharding.mesh.devices)
            wrong += [_differing(name, *part) for part in zip(holders.T, found.T, strict=True) if len(set(part[1])) > 1]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise Diverged(f"replicas of the state differ: {'; '.join(wrong[:_NAMED])}{more}")


def _differing(name: str, devices: np.ndarray, values: np.ndarray) -> str:
    """Who of the devices that hold one part of a leaf holds what."""
    votes = Counter(values.tolist())
    (most, count), *_ = votes.most_common()
    if 2 * count > len(devices):
        others = devices[values != most]
        return f"{name}: {_who(others)} differ{'s' if len(others) == 1 else ''} from {count} others"
    return f"{name}: " + " against ".join(_who(devices[values == vote]) for vote in votes)


def _who(devices: np.ndarray) -> str:
    return ", ".join(f"device {device.id} (process {device.process_index})" for device in devices)
