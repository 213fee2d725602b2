"""Exchanges and the mesh: what cannot work is refused with the config, what has no effect is said at the start."""

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from moe import axes
from moe.config import ConfigError, check
from moe.dispatch import AllToAllConfig, CapacityConfig, ExchangeConfig, RaggedConfig, RingConfig
from moe.train.exchanges import without_effect
from moe.train.ladder import LadderConfig
from moe.train.run import RunConfig
from moe.train.session import Session
from tests.layouts import Layout, run_config

HIERARCHICAL = AllToAllConfig(hierarchical=True)


def config_of(exchange: ExchangeConfig, **mesh: int) -> RunConfig:
    """Checked."""
    return run_config(Layout(mesh=tuple(mesh.items()), exchange=exchange))


def lines(exchange: ExchangeConfig, **mesh: int) -> list[str]:
    config = config_of(exchange, **mesh)
    return list(without_effect(config.model, config.mesh.factors(config.mesh.num_devices)))


@pytest.mark.parametrize(
    ("mesh", "where"),
    [
        ({"fsdp": 8, "expert": 8}, "fsdp_expert"),
        ({"data": -1, "fsdp": 4, "expert": 4}, "fsdp_expert"),  # whatever `data` will be
        ({"data": 4, "tensor": 2}, "none"),
    ],
)
def test_two_steps_over_one_axis_are_refused_with_the_config(mesh: dict[str, int], where: str) -> None:
    said = rf"model\.moe\.exchange\.hierarchical = True: experts lie on one mesh axis alone \({where}\)"
    with pytest.raises(ConfigError, match=said):
        config_of(HIERARCHICAL, **mesh)
    assert config_of(AllToAllConfig(), **mesh)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 4, "expert": 8},
        {"data": -1, "expert": 4},  # known once the devices are
        {},  # one device: a pod's config on a laptop
        {"data": -1},
        {"fsdp": 8},
    ],
    ids=str,
)
def test_two_steps_are_not_refused_where_they_may_work_or_nothing_travels(mesh: dict[str, int]) -> None:
    assert config_of(HIERARCHICAL, **mesh)


def test_a_mesh_knows_its_axes_unless_experts_fold_over_a_data_that_is_not_known() -> None:
    assert axes.MeshConfig(fsdp=4, expert=4).known_factors == axes.MeshConfig(fsdp=4, expert=4).factors(4)
    assert axes.MeshConfig(fsdp=2, expert=4).known_factors is None
    assert axes.MeshConfig(data=2, fsdp=2, expert=3).known_factors is None  # folds nowhere


def test_two_steps_over_one_axis_are_refused_once_the_devices_are_known() -> None:
    config = config_of(HIERARCHICAL, data=-1, expert=4)
    session = _session(config, 4)
    with pytest.raises(ConfigError, match=r"^model\.moe\.exchange\.hierarchical: experts lie .* \(data_expert\)"):
        Session._check_batch(session, (1, config.microbatch_size, 17))


NOT_CUT = "has no effect on this mesh: it cuts neither experts nor positions"


@pytest.mark.parametrize(
    ("exchange", "mesh", "said"),
    [
        (AllToAllConfig(budget=1.5), {}, f"model.moe.exchange = AllToAllConfig {NOT_CUT}"),
        (RaggedConfig(), {"fsdp": 8}, f"model.moe.exchange = RaggedConfig {NOT_CUT}"),
        (AllToAllConfig(drop_duplicates=False), {"tensor": 2, "expert": 2}, "exchange.drop_duplicates = False has no"),
        (AllToAllConfig(budget=1.5), {"tensor": 2}, "exchange.budget = 1.5 has no effect on this mesh: 1 times"),
        (RaggedConfig(budget=2.0), {"fsdp": 2, "expert": 2}, "exchange.budget = 2.0 has no effect on this mesh: 2"),
    ],
)
def test_what_has_no_effect_on_a_mesh_is_said(exchange: ExchangeConfig, mesh: dict[str, int], said: str) -> None:
    found = lines(exchange, **mesh)
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("exchange", "mesh"),
    [
        (RingConfig(), {}),
        (AllToAllConfig(budget=1.5, chunks=2), {"fsdp": 2, "expert": 2}),
        (RaggedConfig(budget=1.5), {"fsdp": 2, "expert": 2}),
        (AllToAllConfig(drop_duplicates=False), {"tensor": 2, "expert_tensor": 2}),
    ],
)
def test_what_works_or_was_not_asked_for_is_not_remarked_on(exchange: ExchangeConfig, mesh: dict[str, int]) -> None:
    assert lines(exchange, **mesh) == []


def test_a_run_says_it_as_it_opens_its_workdir(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = _session(config_of(AllToAllConfig(budget=1.5)), 1)
    session.workdir, session.corpus = tmp_path / "run", SimpleNamespace(fingerprint="")
    with caplog.at_level(logging.INFO):
        Session._open(session, {})
    session.lock.close()
    assert f"model.moe.exchange = AllToAllConfig {NOT_CUT}" in caplog.messages


@pytest.mark.parametrize("capacity", [False, True])
def test_a_ladder_does_not_leave_out_a_budget_that_it_cannot_size(capacity: bool) -> None:
    def run(exchange: ExchangeConfig) -> RunConfig:
        config = config_of(exchange, fsdp=2, expert=2)
        moe: Any = config.model.moe
        dispatch = CapacityConfig() if capacity else moe.dispatch
        model = dataclasses.replace(config.model, moe=dataclasses.replace(moe, dispatch=dispatch))
        return dataclasses.replace(config, model=model, ladder=LadderConfig())

    with pytest.raises(ConfigError, match=r"ladder = .*: cannot size model\.moe\.exchange\.budget: its need is not"):
        check(run(RaggedConfig(budget=1.5)))
    if capacity:
        check(run(RaggedConfig()))
    else:
        with pytest.raises(ConfigError, match="sizes nothing"):
            check(run(RaggedConfig()))
    check(run(AllToAllConfig(budget=1.5)))


def _session(config: RunConfig, devices: int) -> Any:
    """So much of one as its checks read."""
    return SimpleNamespace(config=config, mesh=axes.make_mesh(config.mesh, jax.devices()[:devices]))
