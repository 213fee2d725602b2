"""The compiled train step: one update under many cuts, skipped updates, donated buffers, metrics.

Guards against: an optimizer that hides a wrong scale behind Adam (gradients are compared in tests/test_invariance.py;
here states are), non-finite losses that poison the state (maxtext #3864, #3699), aux loss logged summed over
micro-batches (maxtext #1483), replicas that drift apart (MaxText bias typed as replicated).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.balance import ExpertBiasConfig, LoadBalanceConfig, ZLossConfig
from moe.config import check
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.train.run import RunConfig
from moe.train.state import TrainState, create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step
from tests import grid

RULES = (
    LoadBalanceConfig(coefficient=0.1),
    LoadBalanceConfig(name="lagged", coefficient=0.1, accumulation="lagged"),
    LoadBalanceConfig(name="buffer", coefficient=0.1, accumulation="buffer"),
    ZLossConfig(),
    ExpertBiasConfig(rate=0.01),
)
OPTIM = AdamWConfig(schedule=WarmupCosineConfig(warmup_steps=0), eps=1e-2)  # a large eps: the scale of a gradient shows
SMALL = {name: value[:16] for name, value in grid.batch().items()}


class Run:
    """A state and its compiled step on a mesh."""

    def __init__(self, mesh: dict[str, int], accumulation: int, rules: Any = RULES):
        self.config = RunConfig(
            batch_size=16, accumulation=accumulation, steps=200, mesh=MeshConfig(**({"data": 1} | mesh)), optim=OPTIM,
            balance=rules, model=grid.model_config(),
        )  # fmt: skip
        check(self.config)
        devices = jax.devices()[: self.config.mesh.num_devices]
        self.mesh, self.model = axes.make_mesh(self.config.mesh, devices), self.config.model.abstract()
        tx = make_optimizer(self.config, self.model)
        with jax.set_mesh(self.mesh):
            self.shardings = state_shardings(self.config, self.model, tx, self.mesh)
            self.step = jit_step(self.config, self.model, tx, self.mesh, self.shardings)
            self._first = functools.cache(functools.partial(create_state, self.config, tx, self.shardings))

    def create(self) -> TrainState:
        """The first state; a copy, as a step gives the buffers of its state away."""
        return jax.tree.map(lambda leaf: leaf.copy(), self._first())

    def place(self, arrays: dict[str, np.ndarray] = SMALL) -> Any:
        A, where = self.config.accumulation, axes.sharding(self.mesh, BATCH_LOGICAL)
        return {name: jax.device_put(v.reshape(A, 16 // A, -1), where) for name, v in arrays.items()}

    def steps(
        self, state: TrainState, number: int = 1, arrays: dict[str, np.ndarray] = SMALL
    ) -> tuple[TrainState, list[Any]]:
        metrics = []
        with jax.set_mesh(self.mesh):
            for _ in range(number):
                state, found = self.step(state, self.place(arrays))
                metrics.append(jax.device_get(found))
        return state, metrics


@functools.cache
def prepared(mesh: tuple[tuple[str, int], ...] = (), accumulation: int = 1) -> Run:
    return Run(dict(mesh), accumulation)


@functools.cache
def oracle(rules: Any = RULES) -> tuple[Any, list[Any]]:
    run = prepared() if rules == RULES else Run({}, 1, rules)
    state, metrics = run.steps(run.create(), 2)
    return jax.device_get((state.params, state.balance)), metrics


FOLDED = (("fsdp", 4), ("tensor", 2), ("expert", 2), ("expert_tensor", 2))
CUTS = [
    ((("data", 2),), 2),
    (FOLDED, 1),
    ((("data", 4), ("fsdp", 2), ("expert", 4)), 2),
]


@pytest.mark.parametrize(("mesh", "accumulation"), CUTS, ids=str)
def test_two_steps_end_in_the_same_state(mesh: Any, accumulation: int) -> None:
    rules = tuple(r for r in RULES if r.name != "buffer" or accumulation == 1)
    run = prepared(mesh, accumulation) if rules == RULES else Run(dict(mesh), accumulation, rules)
    state, metrics = run.steps(run.create(), 2)
    (expected_params, expected_balance), expected_metrics = oracle(run.config.balance)
    grid.close_trees(jax.device_get(state.params), expected_params, "params")
    np.testing.assert_array_equal(state.balance["expert_bias"]["bias"], expected_balance["expert_bias"]["bias"])
    np.testing.assert_array_equal(state.balance["lagged"]["load"], expected_balance["lagged"]["load"])
    for found, reference in zip(metrics, expected_metrics, strict=True):
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            if name == "load/max_violation_micro" and accumulation > 1:
                assert (found[name] > reference[name]).all()  # a part of a batch is less even than the whole
                continue
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_compiled_steps_leave_the_state_where_the_table_says() -> None:
    run = prepared(FOLDED, 1)
    state, _ = run.steps(run.create())
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(run.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    gate = state.params["stacks"][0][1]["moe"]["w_gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 4, 16, 8)}
    for leaf in jax.tree.leaves(state.balance):  # typed as replicated, and so they are
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1


def test_the_initial_state_does_not_depend_on_the_mesh() -> None:
    a, b = prepared().create(), prepared(FOLDED, 1).create()
    for x, y in zip(jax.tree.leaves(jax.device_get(a.params)), jax.tree.leaves(jax.device_get(b.params)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_metrics_add_up_and_carry_every_rule() -> None:
    _, (first, second) = oracle()
    assert first["loss"] == pytest.approx(first["loss/lm"] + sum(first[f"loss/{r.name}"] for r in RULES[:4]), rel=1e-6)
    for rule in RULES[:4]:
        assert first[f"balance/{rule.name}"].shape == (2,) and first[f"weight/{rule.name}"] == np.float32(
            rule.coefficient
        )
        np.testing.assert_allclose(
            first[f"loss/{rule.name}"], rule.coefficient * first[f"balance/{rule.name}"].sum(), rtol=1e-5
        )
    tokens = int((SMALL["segment_ids"][:, :-1] > 0).sum())
    assert first["load/tokens"] == tokens
    np.testing.assert_allclose(first["balance/lagged"], 1.0, rtol=1e-5)  # uniform at step 0
    assert (second["balance/lagged"] > 1.005).all()
    assert not first["balance/buffer/load_error"].any() and (first["balance/lagged/load_error"] > 0).all()
    assert not first["load/dropped"].any() and first["learning_rate"] == np.float32(OPTIM.learning_rate)
    assert second["learning_rate"] < first["learning_rate"]
    np.testing.assert_allclose(first["balance/expert_bias/range"], 0.02, rtol=1e-5)


def test_the_bias_moves_once_a_step_however_often_the_batch_is_cut() -> None:
    run = Run({}, 4, (ExpertBiasConfig(rate=0.01),))
    state, _ = run.steps(run.create())
    bias = np.asarray(state.balance["expert_bias"]["bias"])
    assert set(np.abs(bias).round(7).ravel().tolist()) <= {0.0, float(np.float32(0.01))} and np.abs(bias).any()


def test_the_buffer_forgets_at_every_step() -> None:
    """Two identical batches through unchanged parameters give identical terms."""
    run = Run({}, 2, (LoadBalanceConfig(name="buffer", accumulation="buffer"),))
    frozen = dataclasses.replace(run.config, optim=AdamWConfig(lr_scale=((".", 0.0),), schedule=OPTIM.schedule))
    tx = make_optimizer(frozen, run.model)
    with jax.set_mesh(run.mesh):
        shardings = state_shardings(frozen, run.model, tx, run.mesh)
        step, state = jit_step(frozen, run.model, tx, run.mesh, shardings), create_state(frozen, tx, shardings)
        state, first = step(state, run.place())
        _, second = step(state, run.place())
    assert (np.asarray(first["balance/buffer/load_error"]) > 0).all()
    np.testing.assert_array_equal(first["balance/buffer"], second["balance/buffer"])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_nothing_but_the_counters(poison: float) -> None:
    run = prepared()
    good, _ = run.steps(run.create())
    before = jax.device_get((good.params, good.opt_state, good.balance, good.idle_LE))
    healthy = np.asarray(good.params["final_norm"]["scale"])
    broken = dict(
        good.params, final_norm={"scale": jax.device_put(healthy * poison, good.params["final_norm"]["scale"].sharding)}
    )
    after, (metrics,) = run.steps(dataclasses.replace(good, params=broken))
    assert not np.isfinite(metrics["loss"])
    assert (metrics["skipped_total"], metrics["skipped_in_row"], int(after.step)) == (1, 1, 2)
    params = dict(after.params, final_norm={"scale": healthy})
    found = jax.device_get((params, after.opt_state, after.balance, after.idle_LE))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True))

    # Healed, the run goes on where it was, with the same numbers as one that never stumbled.
    after = dataclasses.replace(
        after,
        params=dict(
            after.params, final_norm={"scale": jax.device_put(healthy, run.shardings.params["final_norm"]["scale"])}
        ),
    )
    healed, (metrics,) = run.steps(after)
    assert (metrics["skipped_total"], metrics["skipped_in_row"], int(healed.step)) == (1, 0, 3)
    expected, expected_metrics = oracle()
    grid.close_trees(jax.device_get(healed.params), expected[0], "params")
    assert metrics["learning_rate"] == expected_metrics[1]["learning_rate"]


def test_steps_reduce_the_loss_and_move_every_expert() -> None:
    run = prepared()
    state = run.create()
    before = jax.device_get(state.params)
    state, metrics = run.steps(state, 20)
    assert metrics[-1]["loss/lm"] < metrics[0]["loss/lm"] - 0.3
    for name in ("w_gate", "w_up", "w_down"):
        moved = np.abs(np.asarray(state.params["stacks"][0][1]["moe"][name]) - before["stacks"][0][1]["moe"][name])
        assert (moved.max(axis=(2, 3)) > 1e-4).all(), name


def test_the_key_never_changes_and_the_step_counts_batches() -> None:
    run = prepared()
    state = run.create()
    key = jax.random.key_data(state.key).tolist()
    state, _ = run.steps(state, 3)
    assert int(state.step) == 3 and jax.random.key_data(state.key).tolist() == key


def test_a_batch_of_nothing_but_padding_is_finite() -> None:
    run = prepared()
    empty = {name: np.zeros_like(value) for name, value in SMALL.items()}
    state, (metrics,) = run.steps(run.create(), arrays=empty)
    assert metrics["loss/lm"] == 0 and np.isfinite(metrics["loss"]) and metrics["skipped_total"] == 0
    assert not jnp.asarray(state.balance["expert_bias"]["bias"]).any()
