"""What keeps memory small changes no number: activations and moments on the host, whole steps, checkpoints."""

import dataclasses
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.config import ConfigError
from moe.models.remat import HOST
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.train.checkpoint import Checkpoints
from moe.train.memory import check_memory_kinds
from moe.train.run import CheckpointConfig, RunConfig
from moe.train.state import create_state, init_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step
from tests import grid

PLAIN = RunConfig(
    batch_size=16, accumulation=2, steps=20, balance=(), mesh=MeshConfig(data=1, fsdp=2, context=2, tensor=2, expert=4),
    optim=AdamWConfig(schedule=WarmupCosineConfig(warmup_steps=0)), model=grid.model_config(num_layers=2),
)  # fmt: skip
SMALL = dataclasses.replace(
    PLAIN, optim=dataclasses.replace(PLAIN.optim, tile=256, offload=True),
    model=dataclasses.replace(PLAIN.model, remat="offload", logit_chunk=9),
)  # fmt: skip


def started(run: RunConfig) -> tuple[Any, Any, Any, Any]:
    """(step, state, batch, shardings)."""
    mesh, model = axes.make_mesh(run.mesh), run.model.abstract()
    tx = make_optimizer(run, model)
    shardings = state_shardings(run, model, tx, mesh)
    sharding = axes.sharding(mesh, BATCH_LOGICAL)
    arrays = {k: jax.device_put(v[:16].reshape(2, 8, -1), sharding) for k, v in grid.batch().items()}
    return jit_step(run, model, tx, mesh, shardings), create_state(run, tx, shardings), arrays, shardings


def kinds(tree: Any) -> set[str | None]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_everything_that_saves_memory_together_is_the_plain_step_and_survives_a_checkpoint(tmp_path: Path) -> None:
    found = {}
    for name, run in {"plain": PLAIN, "small": SMALL}.items():
        with jax.set_mesh(axes.make_mesh(run.mesh)):
            step, state, arrays, shardings = started(run)
            for _ in range(2):
                state, metrics = step(state, arrays)
            found[name] = jax.device_get((state.opt_state, metrics["loss"], state.params))
    assert kinds(state.opt_state) == {HOST} and kinds(state.params) == {"device"}
    grid.close_trees(found["small"][:2], found["plain"][:2], "moments and loss")
    # Adam divides by a root that may be tiny, so updates are less accurate than gradients.
    grid.close_trees(found["small"][2], found["plain"][2], "parameters", tolerance=1e-4)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, state, {}, None)
    checkpoints.close()
    again = Checkpoints(tmp_path, CheckpointConfig())
    restored, _ = again.restore(
        2, lambda: init_state(run, make_optimizer(run, run.model.abstract()), state.key), shardings
    )
    again.close()
    assert kinds(restored.opt_state) == {HOST}
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(s.opt_state) for s in (restored, state)))
    with jax.set_mesh(axes.make_mesh(SMALL.mesh)):
        going_on, _ = step(restored, arrays)
    assert int(going_on.step) == 3


@pytest.mark.parametrize(
    ("changed", "path"),
    [({"model": SMALL.model}, "model.remat = 'offload'"), ({"optim": SMALL.optim}, "optim.offload")],
)
def test_devices_without_host_memory_are_refused_by_name(changed: dict[str, Any], path: str) -> None:
    device = types.SimpleNamespace(
        platform="abacus", device_kind="wooden", addressable_memories=lambda: [types.SimpleNamespace(kind="device")]
    )
    mesh = mock.Mock(devices=np.array([[device]], object))
    check_memory_kinds(PLAIN, mesh)
    with pytest.raises(ConfigError) as caught:
        check_memory_kinds(dataclasses.replace(PLAIN, **changed), mesh)
    said = str(caught.value)
    assert said.startswith(path) and "'pinned_host'" in said and "abacus devices here (wooden)" in said
    assert said.endswith("they have device")


def test_the_check_runs_where_the_state_gets_its_place() -> None:
    model = SMALL.model.abstract()
    with mock.patch("moe.train.memory.HOST", "moon"), pytest.raises(ConfigError, match="memory kind 'moon', which cpu"):
        state_shardings(SMALL, model, make_optimizer(SMALL, model), axes.make_mesh(SMALL.mesh))
