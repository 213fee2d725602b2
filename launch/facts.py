"""What all processes of a run must hold alike before the first of them touches a device."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from moe import config as configs
from moe.train.run import RunConfig

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
"""They change what is computed; with different ones the processes would wait for each other's collectives for ever."""


def facts(config: RunConfig, workdir: Path) -> dict[str, str]:
    """Name -> value: every field of the config, the code, versions, the variables that steer the compiler."""
    found = {f"config {path}": repr(value) for path, value in configs.flatten(config).items()}
    found |= {f"version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    found |= {f"variable {name}": repr(os.environ.get(name, "")) for name in _VARIABLES}
    return found | {"code": code_digest(), "python": platform.python_version(), "workdir": str(workdir)}


def code_digest() -> str:
    """Eight bytes that change with any source file of `moe` or `launch`, committed or not."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for top in ("moe", "launch"):
        for path in sorted((root / top).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
