"""What two processes of four devices compute, stated once for the processes and for the test that reads the answers."""

from pathlib import Path

from moe.axes import MeshConfig
from moe.balance import ExpertBiasConfig, LoadBalanceConfig
from moe.data import DataConfig, FolderConfig
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.routing.topk import TopKConfig
from moe.train.run import RunConfig
from tests import grid
from tests.grid import Cut

PROCESSES, DEVICES = 2, 8
DATA, EXPERT = (("data", 8),), (("data", 8), ("expert", 8))
FSDP_TENSOR, THREE = (("fsdp", 4), ("tensor", 2)), (("data", 2), ("fsdp", 2), ("tensor", 2), ("expert", 4))
# Processes hold neighbouring devices: each of these cuts batch, experts or parameters across the two.
CUTS = (
    Cut(mesh=DATA, padding="tokens"),
    Cut(mesh=DATA, accumulation=2, remat="full"),
    Cut(mesh=EXPERT, remat="full"),
    Cut(mesh=EXPERT, accumulation=2, remat="dots", padding="sequences"),
    Cut(mesh=FSDP_TENSOR, accumulation=2, padding="tokens"),
    Cut(mesh=THREE, remat="dots", padding="sequences"),
)
NOISY_ROUTER = TopKConfig(init_std=0.3, jitter=0.1)
ALONE = tuple((grid.LM, *grid.TERMS[index % 3 :: 3]) for index in range(len(CUTS)))
"""Per cut the terms whose loss and gradient are taken, each term in two cuts: running is what takes time here. The
values of all terms, the statistics and the states of the rules are compared in every cut."""
NOISY = Cut(mesh=EXPERT, accumulation=2, remat="full", padding="tokens", router=NOISY_ROUTER)

LAYOUTS: dict[str, tuple[MeshConfig, tuple[int, ...]]] = {
    "data 8": (MeshConfig(data=8), tuple(range(8))),
    "fsdp 4 tensor 2": (MeshConfig(data=1, fsdp=4, tensor=2), tuple(range(8))),
    "tensor 8": (MeshConfig(data=1, tensor=8), tuple(range(8))),
    "interleaved": (MeshConfig(data=8), (0, 4, 1, 5, 2, 6, 3, 7)),
}
"""Meshes on which a batch of text is placed, with the order of the devices; the last one gives a process every other
row, the one before it every row."""
ACCUMULATION, BATCH, STEPS, SEED = 2, 16, 3, 7


def data_config(text: Path) -> DataConfig:
    return DataConfig(
        source=FolderConfig(path=str(text)), cache_dir=f"{text}-cache", validation_fraction=0.2, seq_len=grid.POSITIONS
    )


def run_config(text: Path, mesh: MeshConfig) -> RunConfig:
    """A run whose train step is taken whole, optimizer and metrics and all."""
    return RunConfig(
        steps=20, batch_size=ACCUMULATION * BATCH, accumulation=ACCUMULATION, model=grid.model_config(remat="full"),
        balance=(LoadBalanceConfig(), ExpertBiasConfig()), mesh=mesh, data=data_config(text),
        optim=AdamWConfig(learning_rate=1e-2, schedule=WarmupCosineConfig(warmup_steps=1)),
    )  # fmt: skip
