"""One optimizer step under many layouts of the devices: what `test_layouts.py` compares.

`python -m tests.layouts` runs every folding of (data, context, tensor) x (expert_data, expert, expert_tensor) over
eight devices, a hundred of them, instead of the covering selection of the tests.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from moe import axes
from moe.axes import MeshConfig
from moe.balance import ExpertBiasConfig, LoadBalanceConfig, ZLossConfig
from moe.config import ConfigError, check
from moe.dispatch import AllToAllConfig, ExchangeConfig, RaggedConfig, RingConfig
from moe.kernels.attend import AttendConfig
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.models.pipeline import PipelineConfig
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.routing.topk import TopKConfig
from moe.train.run import RunConfig
from moe.train.state import create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, batch_gradient
from tests import grid
from tests.grid_batch import SEQUENCES, VOCAB, batch

DEVICES, REPEATS = 8, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the devices share one step."""

    mesh: tuple[tuple[str, int], ...] = ()
    exchange: ExchangeConfig = RingConfig()
    attend: Any = "whole"
    """How attention meets keys and values on other devices: whole, gather or ring."""
    accumulation: int = 1
    remat: str = "none"
    pipeline: PipelineConfig | None = None

    def __str__(self) -> str:
        parts = ["x".join(f"{name}{size}" for name, size in self.mesh) or "one", type(self.exchange).__name__[:-6]]
        parts += [self.attend] * (self.attend != "whole") + [f"A{self.accumulation}"] * (self.accumulation > 1)
        parts += [self.remat] * (self.remat != "none")
        parts += [f"M{self.pipeline.microbatches}V{self.pipeline.rounds}"] if self.pipeline is not None else []
        return "-".join(parts)

    @property
    def mesh_config(self) -> MeshConfig:
        return MeshConfig(**({"data": 1} | dict(self.mesh)))


class Step(NamedTuple):
    """What must not depend on the layout."""

    loss: np.ndarray
    gradients: Any
    grad_norm: np.ndarray
    count_LGE: np.ndarray
    """int32 assignments per layer, sequence and expert."""
    dropped: np.ndarray
    bias: np.ndarray
    params: Any
    """After one update."""


def run_config(layout: Layout) -> RunConfig:
    """Attention, a dense MLP every other layer and experts with a shared one; every size divides by 8."""
    attend = AttendConfig(method=layout.attend)
    attention = AttentionConfig(num_heads=8, num_kv_heads=8, head_width=4, head_norm="qk", attend=attend)
    experts = MoEConfig(
        num_experts=8, expert_hidden=16, shared_hidden=16, router=TopKConfig(init_std=0.3), exchange=layout.exchange
    )
    model = DecoderConfig(
        vocab_size=VOCAB, width=32, num_layers=2 * REPEATS, moe_every=2, mlp_hidden=32, init_std=0.1,
        attention=attention, moe=experts, remat=layout.remat, pipeline=layout.pipeline,
    )  # fmt: skip
    rules = (LoadBalanceConfig(coefficient=0.1), ZLossConfig(coefficient=0.1), ExpertBiasConfig(rate=0.01))
    config = RunConfig(
        batch_size=SEQUENCES, accumulation=layout.accumulation, steps=200, mesh=layout.mesh_config, balance=rules,
        model=model, optim=AdamWConfig(learning_rate=0.01, schedule=WarmupCosineConfig(warmup_steps=1)),
        data=dataclasses.replace(RunConfig().data, seq_len=16),
    )  # fmt: skip
    check(config)
    return config


@functools.cache
def first_state() -> Any:
    """The state before the step, on the host. That a mesh makes the same one in place is said in tests/train, not here:
    a program for it would be a quarter of what a layout costs."""
    config = run_config(Layout())
    mesh = axes.make_mesh(config.mesh, jax.local_devices()[:1])
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    with jax.set_mesh(mesh):
        state = create_state(config, tx, state_shardings(config, model, tx, mesh))
    key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.key)))
    return dataclasses.replace(jax.device_get(dataclasses.replace(state, key=())), key=key)


def measure(
    layout: Layout, put: Callable[[Any, Any], Any] = jax.device_put, get: Callable[[Any], Any] = jax.device_get
) -> Step:
    """One step of the grid's batch; `put` and `get` are for several processes, which hold no whole array."""
    config = run_config(layout)
    mesh = axes.make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    A = layout.accumulation
    arrays = {
        name: put(value.reshape(A, SEQUENCES // A, -1), axes.sharding(mesh, BATCH_LOGICAL))
        for name, value in batch().items()
    }

    @jax.jit
    def step(state: Any, arrays: Any) -> Any:
        loss, grads, share = batch_gradient(config, model, state, arrays)
        updates, _ = tx.update(grads, state.opt_state, state.params)
        stats = share.statistics
        bias = config.balance[2].update(state.balance["expert_bias"], stats)["bias"]
        params = optax.apply_updates(state.params, updates)
        return Step(loss, grads, optax.tree.norm(grads), stats.count_BE, stats.dropped_B.sum(), bias, params)

    state = put(first_state(), state_shardings(config, model, tx, mesh))
    with jax.set_mesh(mesh):
        found: Step = get(step(state, arrays))
    count = np.moveaxis(found.count_LGE, 1, 0)
    return found._replace(count_LGE=count.reshape(count.shape[0], -1, count.shape[-1]))


@functools.cache
def oracle() -> Step:
    return measure(Layout())


def same(found: Step, expected: Step) -> None:
    """Raises AssertionError unless the two are the same step: 1e-5 relative per leaf, integers exactly."""
    np.testing.assert_array_equal(found.count_LGE, expected.count_LGE, "load")
    np.testing.assert_array_equal(found.dropped, expected.dropped, "dropped")
    np.testing.assert_array_equal(found.bias, expected.bias, "bias")
    grid.close(found.loss, expected.loss, "loss")
    grid.close(found.grad_norm, expected.grad_norm, "gradient norm")
    grid.close_trees(found.gradients, expected.gradients, "gradient")
    grid.close_trees(found.params, expected.params, "parameters")


GRID = tuple(sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == DEVICES)
"""The ten ways to factor eight devices into three axes; all ten by ten pairs of them fold, as every size is 2^n."""
EXCHANGES: tuple[ExchangeConfig, ...] = (
    AllToAllConfig(),
    RingConfig(),
    AllToAllConfig(budget=1.0, on_overflow="rerun"),
    RaggedConfig(),
    AllToAllConfig(chunks=2, drop_duplicates=False),
)


def folding(dense: tuple[int, ...], experts: tuple[int, ...], fsdp: bool) -> tuple[tuple[str, int], ...]:
    """(data, context, tensor) x (expert_data, expert, expert_tensor); with `fsdp` that axis in the place of data."""
    names = ("fsdp" if fsdp else "data", "context", "tensor", "expert", "expert_tensor")
    sizes = zip(names, (*dense, *experts[1:]), strict=True)
    return tuple((name, size) for name, size in sizes if size > 1)


def foldings() -> Iterator[Layout]:
    """All hundred; what else a layout may differ in takes turns."""
    for row, dense in enumerate(GRID):
        for column, experts in enumerate(GRID):
            turn = row * len(GRID) + column
            yield Layout(
                mesh=folding(dense, experts, fsdp=(row + column) % 2 == 1),
                exchange=EXCHANGES[turn % len(EXCHANGES)],
                attend=("whole", "ring", "gather")[(row + 2 * column) % 3] if dense[1] > 1 else "whole",
                accumulation=2 if turn % 7 == 3 and max(dense[0], 1) <= 4 else 1,
                remat="full" if turn % 5 == 2 else "none",
            )


def selection() -> list[Layout]:
    """Thirty of them, in which every dense grid and every expert grid occurs three times."""
    every = list(foldings())
    return [every[10 * row + (row * 3 + shift) % 10] for row in range(10) for shift in (0, 4, 7)]


def main() -> None:
    expected, wrong = oracle(), 0
    for number, layout in enumerate(foldings(), 1):
        try:
            same(measure(layout), expected)
            said = "same"
        except (AssertionError, ConfigError) as error:
            said, wrong = f"DIFFERS: {str(error).splitlines()[0]}", wrong + 1
        print(f"{number:3} {layout}: {said}", flush=True)
    print(f"{number - wrong} of {number} foldings are the same step to 1e-5")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
