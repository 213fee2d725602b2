"""How long a collective takes among a group of devices, from the links of the chip.

Of n devices, v bytes on each before (scatter) or after (gather): v (n - 1) / n over the bandwidth of the two links of
each axis of the torus that the group stretches over. An all-to-all crosses one of side s in v max((n - 1) / n, s / 4).
Groups larger than a slice pay the rest over the network of the data centre, each device its own share.

Source: Austin et al. 2025, https://jax-ml.github.io/scaling-book, chapter on sharding. Differs from the source: rings
that do not wrap around are taken for whole ones.
"""

import functools
import math
from typing import NamedTuple

from moe.plan.chips import Chip
from moe.plan.topology import shapes


class Link(NamedTuple):
    """How a group of devices talks: `bandwidth` bytes/s of one device inside a slice, and what lies beyond."""

    size: int
    inner: int
    """Devices of the group in one slice."""
    bandwidth: float
    side: int
    """Of the torus that an all-to-all crosses; 1 for a switch."""
    dcn: float

    def gather(self, received: float, latency: float) -> float:
        """Seconds in which every device ends up with `received` bytes, or starts with as many to reduce."""
        if self.size == 1:
            return 0.0
        inside = received * (self.inner - 1) / self.inner / self.bandwidth
        slices = self.size // self.inner
        return latency + inside + received / self.inner * (slices - 1) / slices / self.dcn

    def all_to_all(self, sent: float, latency: float) -> float:
        """Seconds for every device to send `sent` bytes, the same share to each."""
        if self.size == 1:
            return 0.0
        slices = self.size // self.inner
        inside = sent / slices * max((self.inner - 1) / self.inner, self.side / 4 if self.inner > 1 else 0)
        return latency + inside / self.bandwidth + sent * (slices - 1) / slices / self.dcn


def link(chip: Chip, devices: int, size: int, stride: int) -> Link:
    """Of a group of `size` devices, `stride` apart in the order of the mesh, among `devices`."""
    reach, most = stride * size, slice_devices(chip)
    inner = size if reach <= most else max(1, size * most // reach)
    if not chip.axes:
        return Link(size, inner, chip.link_bandwidth, 1, chip.dcn_bandwidth)
    spanned, first = [], chip.devices
    for length in torus(min(devices, most) // chip.devices, chip.axes):
        if first < reach and stride < first * length:
            spanned.append(min(length, max(1, reach // first)))
        first *= length
    bandwidth = 2 * chip.link_bandwidth * max(1, len(spanned))
    return Link(size, inner, bandwidth, max(spanned, default=1), chip.dcn_bandwidth)


@functools.lru_cache
def slice_devices(chip: Chip) -> int:
    """Devices of the largest slice of a TPU, of a GPU's host: what fast links join."""
    return max(map(math.prod, shapes(chip))) * chip.devices if chip.axes else 8


def torus(chips: int, dimensions: int) -> tuple[int, ...]:
    """Sides of a torus of so many chips, as even as its divisors allow, shortest first."""
    sides = []
    for left in range(dimensions, 0, -1):
        root = round(chips ** (1 / left) + 1e-9)
        side = next((n for n in range(max(root, 1), 0, -1) if chips % n == 0), 1)
        sides.append(side)
        chips //= side
    return tuple(sides)
