"""What a capacity limit drops, by hand.

Guards against: ties kept in an undefined order (Megatron's `position` policy), padding that takes places, drops that
are not counted (MaxText `ragged_buffer_factor`), a capacity that depends on the number of devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.balance.statistics import statistics
from moe.config import ConfigError, check
from moe.dispatch import CapacityConfig, DenseConfig, ExpertWeights
from moe.dispatch.capacity import _fill
from moe.routing.base import Routing

E, D = 2, 3


def routing(experts: list[list[int]], weights: list[list[float]]) -> Routing:
    B, S = np.shape(experts)
    return Routing(
        token_BR=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)), expert_BR=jnp.array(experts, jnp.int32),
        weight_BR=jnp.array(weights), probs_BSE=jnp.full((B, S, E), 1 / E), log_z_BS=jnp.zeros((B, S)),
        margin_BS=jnp.ones((B, S)), num_selected=1,
    )  # fmt: skip


def kept(config: CapacityConfig, r: Routing) -> tuple[list[list[int]], list[int]]:
    """(positions with an output, dropped) of every sequence."""
    B, S = r.expert_BR.shape
    keys = jax.random.split(jax.random.key(0), 4)
    w = ExpertWeights(*(jax.random.normal(k, (E, D, D)) for k in keys[:3]))
    x = jax.random.normal(keys[3], (B, S, D))
    y, dropped = config.build()(x, r, w)
    dense, _ = DenseConfig().build()(x, r, w)
    here = np.abs(np.asarray(y)).max(axis=-1) > 0
    np.testing.assert_allclose(np.asarray(y)[here], np.asarray(dense)[here], rtol=1e-5, atol=1e-6)
    return [np.flatnonzero(row).tolist() for row in here], dropped.tolist()


EXPERTS = [[0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1]]
WEIGHTS = [[0.1, 0.5, 0.3, 0.2, 0.9, 0.8], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5] * 6]


def test_order_keeps_the_first_of_each_sequence() -> None:
    # R = 6, E = 2, factor 2/3: C = 2.
    found = kept(CapacityConfig(capacity_factor=2 / 3), routing(EXPERTS, WEIGHTS))
    assert found == ([[0, 1, 3, 5], [0, 1], [0, 1, 2, 3]], [2, 4, 2])


def test_score_keeps_the_highest_weights_and_ties_go_to_the_first() -> None:
    found = kept(CapacityConfig(capacity_factor=2 / 3, keep="score"), routing(EXPERTS, WEIGHTS))
    assert found == ([[1, 3, 4, 5], [4, 5], [0, 1, 2, 3]], [2, 4, 2])


def test_priority_keeps_what_the_router_says_and_ties_go_to_the_first() -> None:
    priority = jnp.array([[0.1, 0.2, 0.9, 0.0, 0.8, 0.3], [0.0, 0.9, 0.0, 0.0, 0.0, 0.7], [0.5] * 6])
    r = dataclasses.replace(routing(EXPERTS, WEIGHTS), priority_BR=priority)
    config = CapacityConfig(capacity_factor=2 / 3, keep="priority")
    assert kept(config, r) == ([[2, 3, 4, 5], [1, 5], [0, 1, 2, 3]], [2, 4, 2])


def test_a_priority_does_not_change_the_load_and_is_ignored_by_other_rules() -> None:
    r = routing(EXPERTS, WEIGHTS)
    ranked = dataclasses.replace(r, priority_BR=jnp.arange(18.0).reshape(3, 6))
    mask, nothing = jnp.ones((3, 6), bool), jnp.zeros((3,), jnp.int32)
    counts = [statistics(one, mask, nothing).count_BE for one in (r, ranked)]
    np.testing.assert_array_equal(counts[0], counts[1])
    np.testing.assert_array_equal(counts[0], [[4, 2], [0, 6], [3, 3]])
    for keep in ("order", "score"):
        config = CapacityConfig(capacity_factor=2 / 3, keep=keep)  # type: ignore[arg-type]
        assert kept(config, r) == kept(config, ranked)


def test_a_router_without_priority_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep = 'priority': this router gives its assignments no priority"):
        kept(CapacityConfig(keep="priority"), routing(EXPERTS, WEIGHTS))


@pytest.mark.parametrize("keep", ["order", "score", "priority"])
def test_void_assignments_take_no_place_and_are_not_dropped(keep: Any) -> None:
    experts = [[E, E, 0, E, 0, 0], [E] * 6]
    weights = [[0.9, 0.9, 0.5, 0.9, 0.5, 0.5], [0.9] * 6]
    r = dataclasses.replace(routing(experts, weights), priority_BR=jnp.array(weights))
    found = kept(CapacityConfig(capacity_factor=2 / 3, keep=keep), r)
    assert found == ([[2, 4], []], [1, 0])


def test_the_buffer_is_rounded_up_and_never_larger_than_the_assignments() -> None:
    # factor 0.4: ceil(0.4 * 6 / 2) = 2, as above; factor 0.3: ceil(0.9) = 1; a huge factor keeps all.
    assert kept(CapacityConfig(capacity_factor=0.4), routing(EXPERTS, WEIGHTS))[1] == [2, 4, 2]
    assert kept(CapacityConfig(capacity_factor=0.3), routing(EXPERTS, WEIGHTS))[1] == [4, 5, 4]
    assert kept(CapacityConfig(capacity_factor=1e6), routing(EXPERTS, WEIGHTS))[1] == [0, 0, 0]
    # factor 1.1 of 10 is 11, and not 12 because floats say 11.000000000000002.
    assert kept(CapacityConfig(capacity_factor=1.1), routing([[0] * 20], [[0.5] * 20]))[1] == [9]


def test_sequences_do_not_compete() -> None:
    for rows in ([0, 1, 2], [2, 0], [1]):
        found = kept(
            CapacityConfig(capacity_factor=2 / 3), routing([EXPERTS[r] for r in rows], [WEIGHTS[r] for r in rows])
        )
        assert found[1] == [[2, 4, 2][r] for r in rows]


def test_dropped_assignments_carry_no_gradient() -> None:
    r = routing(EXPERTS, WEIGHTS)
    w = ExpertWeights(*(jax.random.normal(k, (E, D, D)) for k in jax.random.split(jax.random.key(0), 3)))

    def value(x: jax.Array) -> jax.Array:
        return CapacityConfig(capacity_factor=2 / 3).build()(x, r, w)[0].sum()

    moved = np.abs(np.asarray(jax.grad(value)(jax.random.normal(jax.random.key(1), (3, 6, D))))).max(axis=-1) > 0
    assert [np.flatnonzero(row).tolist() for row in moved] == [[0, 1, 3, 5], [0, 1], [0, 1, 2, 3]]


def two_choices(experts_BSK: np.ndarray, keep: Any) -> tuple[np.ndarray, np.ndarray]:
    """(bool [B, S, K] which assignments are kept, [B] dropped) of 4 experts with C = ceil(0.5 * R / 4)."""
    B, S, K = experts_BSK.shape
    rng = np.random.default_rng(1)
    shape = (B, S * K)
    r = Routing(
        token_BR=jnp.broadcast_to(jnp.repeat(jnp.arange(S, dtype=jnp.int32), K), shape),
        expert_BR=jnp.asarray(experts_BSK.reshape(shape), jnp.int32), weight_BR=jnp.asarray(rng.uniform(0.1, 1, shape)),
        probs_BSE=jnp.full((B, S, 4), 0.25), log_z_BS=jnp.zeros((B, S)), margin_BS=jnp.ones((B, S)), num_selected=K,
        priority_BR=jnp.asarray(rng.uniform(0, 1, shape), jnp.float32),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 4)
    w = ExpertWeights(*(jax.random.normal(key, (4, D, D)) for key in keys[:3]))
    run = CapacityConfig(capacity_factor=0.5, keep=keep).build()

    def value(weight_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, dropped_B = run(jax.random.normal(keys[3], (B, S, D)), dataclasses.replace(r, weight_BR=weight_BR), w)
        return y.sum(), dropped_B

    gradient, dropped_B = jax.grad(value, has_aux=True)(r.weight_BR)
    return np.asarray(gradient != 0).reshape(B, S, K), np.asarray(dropped_B)


@pytest.mark.parametrize("keep", ["order", "score", "priority"])
def test_by_order_alone_no_later_token_pushes_out_an_earlier_one_and_nothing_is_lost(keep: Any) -> None:
    """Two choices a token: with first choices before all second ones, a later token could push out an earlier one."""
    rng = np.random.default_rng(0)
    draw = lambda: np.stack([[rng.permutation(4)[:2] for _ in range(9)] for _ in range(8)])  # noqa: E731
    experts = draw()
    experts[:, 8] = 4  # padding
    other = experts.copy()
    other[:, 5:8] = draw()[:, 5:8]
    (before, dropped), (after, other_dropped) = two_choices(experts, keep), two_choices(other, keep)
    for kept_BSK, dropped_B in ((before, dropped), (after, other_dropped)):
        np.testing.assert_array_equal(kept_BSK.sum(axis=(1, 2)) + dropped_B, 2 * 8)
    loads = np.stack([np.bincount(row.ravel(), minlength=5)[:4] for row in experts])
    np.testing.assert_array_equal(before.sum(axis=(1, 2)), np.minimum(loads, 3).sum(axis=1))  # C = ceil(0.5 * 18 / 4)
    assert dropped.all(), "the case shows nothing"
    np.testing.assert_equal((before != after)[:, :5].any(), keep != "order")


def test_slots_are_filled_by_expert_then_rank() -> None:
    slots, dropped = _fill(jnp.array([1, 0, 1, 2, 1, 0]), jnp.zeros(6), 2, 2)
    np.testing.assert_array_equal(slots, [[1, 5], [0, 2]])
    assert int(dropped) == 1  # assignment 4; assignment 3 names no expert


def test_a_capacity_factor_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"capacity_factor = 0: must be greater than 0"):
        check(CapacityConfig(capacity_factor=0))
