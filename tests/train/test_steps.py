"""Steps on a ladder: as many programs as rungs in use, numbers that no sufficient rung changes, needs in the log."""

import dataclasses
import functools
from typing import Any

import jax
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.dispatch import CapacityConfig, DroplessConfig
from moe.train.ladder import LadderConfig
from moe.train.run import RunConfig
from moe.train.state import TrainState, create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL
from moe.train.steps import Steps
from tests import grid
from tests.grid_batch import batch

LADDER = LadderConfig(rungs=(0.5, 1.0, 8.0), headroom=1.0, dwell=1)


def config_of(dispatch: Any, ladder: LadderConfig | None) -> RunConfig:
    return RunConfig(
        batch_size=grid.SEQUENCES, steps=200, mesh=MeshConfig(data=1), model=grid.model_config(dispatch), ladder=ladder
    )


class Session:
    """A run of steps on the grid's batch."""

    def __init__(self, ladder: LadderConfig | None, capacity: float = 8.0):
        config = config_of(CapacityConfig(capacity_factor=capacity), ladder)
        check(config)
        mesh = axes.make_mesh(config.mesh, jax.devices()[:1])
        model = config.model.abstract()
        tx = make_optimizer(config, model)
        shardings = state_shardings(config, model, tx, mesh)
        self.steps = Steps(config, model, tx, mesh, shardings)
        self.state = jax.tree.map(lambda leaf: leaf.copy(), first_state())
        where = axes.sharding(mesh, BATCH_LOGICAL)
        self.arrays = {name: jax.device_put(value[None], where) for name, value in batch().items()}
        self.number = 0

    def step(self) -> dict[str, Any]:
        self.number += 1
        self.state, metrics = self.steps(self.number, self.state, self.arrays)
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        return self.steps.observe(values | {"step": self.number})


@functools.cache
def first_state() -> TrainState:
    """One for every session: no capacity and no ladder is part of it. A session steps from a copy."""
    config = config_of(CapacityConfig(), None)
    mesh, model = axes.make_mesh(config.mesh, jax.devices()[:1]), config.model.abstract()
    tx = make_optimizer(config, model)
    return create_state(config, tx, state_shardings(config, model, tx, mesh))


@functools.cache
def without_ladder() -> list[dict[str, Any]]:
    """Four steps at the capacity of the config."""
    plain = Session(None)
    return [plain.step() for _ in range(4)]


def test_the_step_climbs_down_compiles_each_rung_once_and_says_what_it_ran_with() -> None:
    session = Session(LADDER)
    found, expected = [session.step() for _ in range(4)], without_ladder()
    need = max(expected[0]["dispatch/need"])
    assert 1.0 < need < 8.0 and all(len(values["dispatch/need"]) == grid.LAYERS for values in found)
    assert [values["dispatch/capacity"] for values in found] == [8.0] * 4, "no lower rung is enough"
    assert len(session.steps._compiled) == 1 and "dispatch/capacity" not in expected[0]
    for mine, wanted in zip(found, expected, strict=True):
        assert mine["load/dropped"] == [0.0] * grid.LAYERS
        grid.close(mine["loss"], wanted["loss"], "loss")


def test_a_rung_above_the_need_changes_no_number_and_one_below_drops() -> None:
    enough = dataclasses.replace(LADDER, rungs=(1.0, 6.0, 8.0))
    session, tight = Session(enough), Session(None, capacity=1.0)
    found, expected = [session.step() for _ in range(4)], without_ladder()
    assert [values["dispatch/capacity"] for values in found] == [8.0, 8.0, 6.0, 6.0]
    assert len(session.steps._compiled) == 2
    for mine, wanted in zip(found, expected, strict=True):
        assert not any(mine["load/dropped"])
        grid.close(mine["loss"], wanted["loss"], "loss")
    assert all(share > 0 for share in tight.step()["load/dropped"])


def test_the_rung_is_part_of_what_a_checkpoint_holds() -> None:
    enough = dataclasses.replace(LADDER, rungs=(1.0, 6.0, 8.0))
    session, resumed = Session(enough), Session(enough)
    for _ in range(3):
        session.step()
    resumed.steps.set_state(session.steps.get_state())
    resumed.number, resumed.state = 3, jax.tree.map(lambda leaf: leaf.copy(), session.state)
    assert session.step()["dispatch/capacity"] == resumed.step()["dispatch/capacity"] == 6.0
    assert Session(None).steps.get_state() == {}


def test_steps_go_back_to_a_checkpoint_and_to_the_start() -> None:
    enough = dataclasses.replace(LADDER, rungs=(1.0, 6.0, 8.0))
    session = Session(enough)
    first = session.step()["dispatch/capacity"]
    saved = session.steps.get_state()
    assert [session.step()["dispatch/capacity"] for _ in range(3)][-1] == 6.0
    _, left = session.steps(5, session.state, session.arrays)  # begun, and never observed
    session.state, session.number = _, 1
    session.steps.set_state(saved)
    assert session.steps.get_state() == saved and session.steps._capacities == {}
    assert session.step()["dispatch/capacity"] == 8.0
    session.steps.set_state({})
    session.number = 0
    assert session.steps.get_state() == Session(enough).steps.get_state()
    assert session.step()["dispatch/capacity"] == first == 8.0 and len(left) > 0


def test_a_ladder_that_sizes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ladder = .*sizes nothing"):
        check(config_of(DroplessConfig(), LADDER))
