"""Budgets, further rounds and portions of the all-to-all; layers in a pipeline.

Guards against: rows truncated without a count (MaxText `ragged_buffer_factor`), a later token that pushes out an
earlier one, drops chosen anew by the recomputed layer, an error of the mesh that shows as a crash inside XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe import axes
from moe.config import ConfigError, check
from moe.dispatch import (
    AllToAllConfig,
    CapacityConfig,
    DenseConfig,
    DroplessConfig,
    ExchangeConfig,
    RaggedConfig,
    dispatch,
)
from moe.models.remat import recomputed
from tests.dispatch.cases import RING, B, E, K, S, expert_weights, inputs, listed, loop, mesh_of, routing, run
from tests.grid import close, close_trees

DROPLESS = DroplessConfig()
CUT_2222 = "fsdp 2 context 2 tensor 2, expert 2 2"


def over_budget(case: str, rows: int, columns: int, ranks: int, budget: float, chunks: int = 1) -> np.ndarray:
    """bool [B, R]: what a grid of devices, `rows` of sequences by `columns` of positions, drops. One by one."""
    _, experts, _ = listed(case)
    dropped = np.zeros(experts.shape, bool)
    positions = -(-S // columns)
    for row in range(rows):
        for column in range(columns):
            mine = [
                (b, s * K + k) if s < S else None
                for b in range(row * B // rows, (row + 1) * B // rows)
                for s in range(column * positions, (column + 1) * positions)
                for k in range(K)
            ]
            size = len(mine) // chunks
            for portion in (mine[i * size : (i + 1) * size] for i in range(chunks)):
                room = [int(np.ceil(budget * size / ranks))] * ranks
                for at in portion:
                    if at is not None and (e := experts[at]) < E:
                        dropped[at] = room[e // (E // ranks)] == 0
                        room[e // (E // ranks)] -= not dropped[at]
    return dropped


@pytest.mark.parametrize("case,chunks", [("full", 1), ("padded", 1), ("two experts", 2)])
def test_a_budget_drops_what_comes_last_to_a_full_buffer_counts_it_and_gives_it_no_gradient(
    case: str, chunks: int
) -> None:
    (y, dropped_B), (_, weights, _) = run(DROPLESS, case, CUT_2222, AllToAllConfig(budget=0.75, chunks=chunks))
    void = over_budget(case, 2, 4, 2, 0.75, chunks)
    assert 0 < void.sum() < void.size
    np.testing.assert_array_equal(dropped_B, void.sum(axis=1))
    close(y, loop(case, void), "y")
    np.testing.assert_array_equal(weights == 0, void | (listed(case)[1] == E))


def test_a_ragged_budget_is_of_what_a_device_receives() -> None:
    """Two senders of 32 rows, in sequences of their own: room for 24, of which the first sender may take all."""
    folding, exchange = "data 2, expert 2", RaggedConfig(budget=0.5)
    (y, dropped_B), (_, weights, _) = run(DROPLESS, "padded", folding, exchange)
    to = (listed("padded")[1] // (E // 2)).reshape(2, -1)
    over = [[max(0, int((to == rank).sum()) - B * S * K // 4) for rank in (0, 1)]]
    assert dropped_B.sum() == np.sum(over) > 0 and not dropped_B[: B // 2].any()
    void = (weights == 0) & (listed("padded")[1] < E)
    np.testing.assert_array_equal(dropped_B, void.sum(axis=1))
    close(y, loop("padded", void), "y")


def test_the_native_ragged_exchange_is_what_tpus_get() -> None:
    x, combine, weights = inputs()
    token, expert, _ = listed("full")
    mesh = mesh_of({"fsdp": 2, "expert": 2})

    def layer(x: jax.Array) -> jax.Array:
        exchange = RaggedConfig(transport="native")
        return dispatch(DROPLESS.build(), x, routing(token, expert, combine, K), weights, exchange)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum())).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@ragged_all_to_all") == 5  # rows, what is known of them, results; two gradients


def test_a_capacity_and_a_budget_drop_one_after_the_other_and_every_drop_is_counted_once() -> None:
    config, exchange = CapacityConfig(capacity_factor=0.5), AllToAllConfig(budget=0.5)
    (_, by_capacity_B), _ = run(config, "full")
    (y, dropped_B), (_, weights, _) = run(config, "full", CUT_2222, exchange)
    assert (dropped_B >= by_capacity_B).all() and dropped_B.sum() > by_capacity_B.sum() > 0
    np.testing.assert_array_equal(dropped_B, (weights == 0).sum(axis=1))
    close(y, loop("full", weights == 0), "y")


def test_a_recomputed_layer_drops_the_same_rows() -> None:
    """And its backward pass is that of the layer that keeps everything."""
    x, combine, weights = inputs()
    token, expert, _ = listed("full")
    mesh = mesh_of({"fsdp": 2, "expert": 2})

    def value(x: jax.Array, combine: jax.Array, remat: str) -> jax.Array:
        def layer(x: jax.Array, combine: jax.Array) -> Any:
            return dispatch(
                DROPLESS.build(), x, routing(token, expert, combine, K), weights, AllToAllConfig(budget=0.75)
            )

        return (recomputed(layer, remat)(x, combine)[0] ** 2).sum()

    with jax.set_mesh(mesh):
        kept, again = (
            jax.jit(jax.grad(functools.partial(value, remat=r), argnums=(0, 1)))(x, combine) for r in ("none", "full")
        )
    close_trees(again, kept, "gradient")
    assert (np.asarray(kept[1]) == 0).any()


@pytest.mark.parametrize("exchange", [RING, AllToAllConfig(), AllToAllConfig(budget=1.0, on_overflow="rerun")], ids=str)
def test_stages_side_by_side_each_compute_their_own(exchange: ExchangeConfig) -> None:
    """As a pipeline runs layers: all stages at once, the stage being one more dimension of everything."""
    x, combine, weights = inputs()
    token, expert, _ = listed("two experts")
    mesh = mesh_of({"stages": 2, "fsdp": 2, "tensor": 2, "expert": 2})
    stages = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), tree)  # noqa: E731

    def layer(x: jax.Array, combine: jax.Array, weights: Any) -> Any:
        return dispatch(DROPLESS.build(), x, routing(token, expert, combine, K), weights, exchange)[0]

    grad = jax.grad(lambda *values: (axes.side_by_side(layer, *values) ** 2).sum(), argnums=(0, 1, 2))
    with jax.set_mesh(mesh):
        values = jax.device_put(stages((x, combine, weights)), NamedSharding(mesh, PartitionSpec(axes.STAGE)))
        found = jax.jit(grad)(*values)
    for stage in (0, 1):
        one = jax.tree.map(lambda leaf: leaf[stage], stages((x, combine, weights)))  # noqa: B023
        expected = jax.grad(
            lambda x, c, w: (DenseConfig().build()(x, routing(token, expert, c, K), w)[0] ** 2).sum(), argnums=(0, 1, 2)
        )(*one)
        close_trees(jax.tree.map(lambda leaf: leaf[stage], found), expected, "gradient")  # noqa: B023


def test_a_layer_runs_inside_a_map_that_already_took_the_stages() -> None:
    x, combine, weights = inputs()
    token, expert, _ = listed("full")

    def layer(x: jax.Array) -> jax.Array:
        return dispatch(DROPLESS.build(), x, routing(token, expert, combine, K), weights, AllToAllConfig())[0]

    mesh = mesh_of({"stages": 2, "fsdp": 2, "tensor": 2, "expert": 4})
    own = PartitionSpec(axes.STAGE)
    with jax.set_mesh(mesh):
        staged = jax.shard_map(lambda x: layer(x[0])[None], in_specs=own, out_specs=own, axis_names={axes.STAGE})
        y = jax.jit(staged)(jnp.stack([x, -x]))
    expected = [DenseConfig().build()(one, routing(token, expert, combine, K), weights)[0] for one in (x, -x)]
    close(y, np.stack(expected), "y")


def test_two_steps_need_two_axes() -> None:
    with pytest.raises(ConfigError, match=r"hierarchical = True: experts lie on one mesh axis alone \(fsdp_expert\)"):
        run(DROPLESS, "full", "fsdp 2 tensor 2, expert 2 2", AllToAllConfig(hierarchical=True))


@pytest.mark.parametrize("wrong,message", [
    (AllToAllConfig(budget=0.0), "budget = 0.0: must be greater than 0"),
    (AllToAllConfig(on_overflow="rerun"), "on_overflow = 'rerun': is ignored without a budget"),
    (AllToAllConfig(chunks=0), "chunks = 0: must be at least 1"),
], ids=["budget", "rerun", "chunks"])  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong: AllToAllConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(wrong)


def test_one_token_on_many_devices_is_padded() -> None:
    """As in decoding: fewer positions than devices that cut them."""
    x, w = jax.random.normal(jax.random.key(0), (8, 1, 8)), expert_weights()
    token, expert = np.zeros((8, K), np.int32), np.tile(np.array([3, 5], np.int32), (8, 1))
    with jax.set_mesh(mesh_of({"fsdp": 2, "context": 2, "tensor": 2, "expert": 4})):
        y, dropped = jax.jit(
            lambda x: dispatch(
                DROPLESS.build(), x, routing(token, expert, jnp.ones((8, K)), K), w, AllToAllConfig(budget=4.0)
            )
        )(x)
    expected, _ = DenseConfig().build()(x, routing(token, expert, jnp.ones((8, K)), K), w)
    close(y, expected, "y")
    assert not np.asarray(dropped).any()
