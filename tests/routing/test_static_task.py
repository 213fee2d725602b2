"""A table from task to experts.

Guards against: experts of other tasks that learn, outputs of old tasks that move when a skill is added.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.balance.statistics import statistics
from moe.config import ConfigError, check
from moe.dispatch import DenseConfig, DispatchConfig, DroplessConfig, ExpertWeights
from moe.layers.moe import MoEConfig
from moe.routing.base import Context, RouterConfig, Routing
from moe.routing.static_task import StaticTaskConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    StaticTaskConfig(tasks=((0, 1), (2, 3))),
    StaticTaskConfig(tasks=((5,), (0, 2, 4)), general=(7,)),
    StaticTaskConfig(tasks=((3,), (6,))),
]
B, S, D, F = 2, 6, 8, 8
TASKS = np.array([[0, 0, 1, 1, 2, 2], [1, 2, 2, 0, 0, 1]], np.int32)
DISPATCHERS = pytest.mark.parametrize("dispatch", [DenseConfig(), DroplessConfig()], ids=["dense", "dropless"])


def context(tasks: np.ndarray = TASKS, padding: int = 0) -> Context:
    return dataclasses.replace(context_for(B, S, padding=padding), task_BS=jnp.asarray(tasks))


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, S, D))


def experts(E: int) -> ExpertWeights:
    """Expert e is the same however many there are."""
    keys = jax.vmap(lambda e: jax.random.fold_in(jax.random.key(4), e))(jnp.arange(E))
    draw = lambda shape: jax.vmap(lambda key: 0.3 * jax.random.normal(key, shape))(keys)  # noqa: E731
    return ExpertWeights(draw((D, F)), draw((D, F)) + 0.1, draw((F, D)))


def mlp(x: np.ndarray, weights: ExpertWeights, expert: int) -> np.ndarray:
    gate, up, down = (np.asarray(w[expert], np.float64) for w in weights)
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def route(config: StaticTaskConfig, E: int, at: Context | None = None) -> Routing:
    return config.build(jax.random.key(0), D, E)(tokens(), at or context(), jnp.zeros(E))


def output(config: StaticTaskConfig, E: int, dispatch: DispatchConfig, at: Context | None = None) -> np.ndarray:
    run = jax.jit(lambda x, weights: dispatch.build()(x, route(config, E, at), weights)[0])
    return np.asarray(run(tokens(), experts(E)))


@DISPATCHERS
def test_the_output_is_the_mean_over_the_experts_of_the_task(dispatch: DispatchConfig) -> None:
    config, E = StaticTaskConfig(tasks=((3,), (0, 2), (1, 5)), general=(5,)), 6
    sets = {0: [3, 5], 1: [0, 2, 5], 2: [1, 5]}  # the general expert once, also where the task names it
    y, x = output(config, E, dispatch, context(padding=1)), np.asarray(tokens(), np.float64)
    for b in range(B):
        for s in range(S):
            chosen = sets[int(TASKS[b, s])] if s < S - 1 else []
            expected = sum((mlp(x[b, s], experts(E), e) for e in chosen), np.zeros(D)) / max(len(chosen), 1)
            np.testing.assert_allclose(y[b, s], expected, rtol=1e-4, atol=1e-6)


def test_sets_of_different_sizes_are_filled_up_with_void_assignments() -> None:
    found = route(StaticTaskConfig(tasks=((3,), (0, 2), (1, 4, 5))), 6)
    experts_BSK = np.asarray(found.expert_BR).reshape(B, S, 3)
    rows = {0: [3, 6, 6], 1: [0, 2, 6], 2: [1, 4, 5]}
    np.testing.assert_array_equal(experts_BSK, [[rows[int(task)] for task in row] for row in TASKS])
    sizes = np.where(experts_BSK < 6, 1.0, 0.0).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found.weight_BR.reshape(B, S, 3), (experts_BSK < 6) / sizes)
    np.testing.assert_allclose(found.probs_BSE.sum(axis=-1), np.ones((B, S)), rtol=1e-6)
    assert found.num_selected == 3 and StaticTaskConfig(tasks=((3,), (0, 2))).experts_per_token(6) == 2


@DISPATCHERS
def test_experts_that_no_token_names_get_exactly_no_gradient(dispatch: DispatchConfig) -> None:
    config, E = StaticTaskConfig(tasks=((0,), (1, 2), (4,))), 6
    tasks = np.where(TASKS == 2, 1, TASKS)  # nobody has task 2

    def loss(weights: ExpertWeights) -> jax.Array:
        y, _ = dispatch.build()(tokens(), route(config, E, context(tasks)), weights)
        return jnp.square(y).sum()

    for leaf in jax.jit(jax.grad(loss))(experts(E)):
        np.testing.assert_array_equal(np.abs(leaf).max(axis=(1, 2)) > 0, [True, True, True, False, False, False])


@DISPATCHERS
def test_adding_a_skill_leaves_the_outputs_of_old_tasks_bit_for_bit(dispatch: DispatchConfig) -> None:
    old = StaticTaskConfig(tasks=((0,), (1, 2), (3,)), general=(4,))
    new = dataclasses.replace(old, tasks=(*old.tasks, (0, 1, 2, 5)))  # a new expert, and the largest set of all
    np.testing.assert_array_equal(output(new, 6, dispatch), output(old, 5, dispatch))
    fourth = np.where(TASKS == 2, 3, TASKS)
    y = output(new, 6, dispatch, context(fourth))
    assert not np.allclose(y[fourth == 3], output(old, 5, dispatch)[fourth == 3])
    np.testing.assert_array_equal(y[fourth != 3], output(old, 5, dispatch)[fourth != 3])


@DISPATCHERS
def test_a_set_of_one_expert_is_a_dense_layer(dispatch: DispatchConfig) -> None:
    y = output(StaticTaskConfig(tasks=((2,), (2,), (2,))), 4, dispatch)
    np.testing.assert_allclose(y, mlp(np.asarray(tokens(), np.float64), experts(4), 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unknown", [3, 99, -1])
def test_a_task_beyond_the_table_goes_to_the_general_experts_alone(unknown: int) -> None:
    tasks = np.where(TASKS == 2, unknown, TASKS)
    with_general = route(StaticTaskConfig(tasks=((0,), (1,), (2, 3)), general=(4,)), 5, context(tasks))
    rows = np.asarray(with_general.expert_BR).reshape(B, S, 3)
    assert (rows[tasks == unknown] == [4, 5, 5]).all()
    assert (rows[tasks == 1] == [1, 4, 5]).all()
    without = route(StaticTaskConfig(tasks=((0,), (1,), (2, 3))), 5, context(tasks))
    lost = tasks == unknown
    assert (np.asarray(without.expert_BR).reshape(B, S, 2)[lost] == 5).all() and not without.probs_BSE[lost].any()
    assert np.isfinite(without.weight_BR).all() and not np.asarray(without.weight_BR).reshape(B, S, 2)[lost].any()
    # Nor do they disappear: they are counted.
    real = np.asarray(context(tasks).mask_BS)
    sums = statistics(without, real, jnp.zeros((B,), jnp.int32))
    np.testing.assert_array_equal(sums.unserved_B, (lost & real).sum(axis=1))
    assert (lost & real).any()


def test_there_are_no_parameters() -> None:
    config: Any = EXAMPLES[0]
    assert not jax.tree.leaves(param.pure(config.build(jax.random.key(0), D, 8))) and not config.task_gradient


def test_tables_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tasks = \(\): must name the experts of at least one task"):
        check(StaticTaskConfig())
    with pytest.raises(ConfigError, match=r"tasks = .*: task 1 names an expert twice"):
        check(StaticTaskConfig(tasks=((0,), (1, 1))))
    with pytest.raises(ConfigError, match=r"tasks = .*: task 1 has no expert, and there is no general one"):
        check(StaticTaskConfig(tasks=((0,), ())))
    check(StaticTaskConfig(tasks=((0,), ()), general=(1,)))
    for router, said in (
        (StaticTaskConfig(tasks=((0,), (4,))), r"router.tasks = .*: expert 4 is not one of the layer's: 0 to .* = 3"),
        (StaticTaskConfig(tasks=((0,),), general=(-1,)), r"router.general = \(-1,\): expert -1 is not one"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(MoEConfig(num_experts=4, router=router))
