"""Kinds of memory a run asks for, against those that its devices have."""

from jax.sharding import Mesh

from moe.config import ConfigError
from moe.models.remat import HOST
from moe.train.run import RunConfig


def check_memory_kinds(config: RunConfig, mesh: Mesh) -> None:
    """ConfigError if the config keeps something in host memory that the mesh's devices cannot address."""
    asked = {
        "model.remat = 'offload'": config.model.remat == "offload",
        "optim.offload = True": config.optim.offload,
    }
    device = mesh.devices.flat[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    for path in [path for path, yes in asked.items() if yes and HOST not in kinds]:
        raise ConfigError(
            f"{path}: needs the memory kind {HOST!r}, which {device.platform} devices here ({device.device_kind}) do"
            f" not have; they have {', '.join(kinds)}"
        )
