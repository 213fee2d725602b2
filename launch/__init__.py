"""What a person runs, as `python -m launch.NAME`.

Where libtpu is installed for its compiler (`launch.compile`) on a machine without a TPU, JAX would start it in vain: a
third of a second, 100 MB and four lines of complaint on stderr, or none of it if it knows that only the CPU is left.
"""

import importlib.util
import os
from pathlib import Path

_GOOGLE = "0x1ae0"
"""Vendor of TPUs on the PCI bus."""


def _only_the_cpu_is_left() -> bool:
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return False
    from importlib import metadata

    if importlib.util.find_spec("jax_plugins") or metadata.entry_points(group="jax_plugins"):
        return False
    return not any(path.read_text().strip() == _GOOGLE for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


if _only_the_cpu_is_left():
    os.environ["JAX_PLATFORMS"] = "cpu"
