"""Blocks, the grouped product on them, and the permutation, against one row at a time.

Guards against: wrong gradients with empty experts (tokamax #887, marin #7484), a hang or a crash when an expert gets no
token (DeepSpeed #5066).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels import grouped as kernels
from moe.kernels.grouped import block_rows, layout, make_blocks, make_sorted, order_by, permute, resolved

E = 4
CASES = {
    "random": [1, 3, 0, 2, 2, 1, 0, 3, 3, 1, 2, 0, 1, 1, 2, 3, 0, 2, 1],
    "empty experts": [1, 1, 3, 1, 3, 3, 1],
    "one expert takes all": [2] * 17,
    "one assignment": [3],
    "all void": [E] * 9,
    "some void": [E, 0, 1, E, E, 3, 0, E],
    "exactly full blocks": [0] * 8 + [2] * 16,
}
each_case = pytest.mark.parametrize("experts", CASES.values(), ids=CASES.keys())


@each_case
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_every_real_assignment_sits_once_in_a_block_of_its_expert(experts: list[int], rows: int) -> None:
    blocks = make_blocks(jnp.array(experts, jnp.int32), E, rows)
    R, N = len(experts), len(experts) // rows + E
    assert blocks.assignment_Nb.shape == (N, rows) and blocks.expert_N.shape == (N,) and blocks.slot_R.shape == (R,)
    assert ((blocks.expert_N >= 0) & (blocks.expert_N < E)).all()
    seen = {}
    for block in range(N):
        for at in range(rows):
            if (assignment := int(blocks.assignment_Nb[block, at])) < R:
                assert experts[assignment] == int(blocks.expert_N[block])
                assert assignment not in seen
                seen[assignment] = block * rows + at
    assert sorted(seen) == [r for r in range(R) if experts[r] < E]
    for r in range(R):
        assert int(blocks.slot_R[r]) == seen.get(r, N * rows)
    for e in range(E):  # stable: by order within an expert
        slots = [seen[r] for r in sorted(seen) if experts[r] == e]
        assert slots == sorted(slots)


@each_case
def test_sorted_rows_hold_every_real_assignment_once_in_order_and_void_ones_nowhere(experts: list[int]) -> None:
    slots = make_sorted(jnp.array(experts, jnp.int32), E, len(experts))
    real = sorted((e, r) for r, e in enumerate(experts) if e < E)
    R = len(experts)
    np.testing.assert_array_equal(slots.assignment_N, [r for _, r in real] + [R] * (R - len(real)))
    np.testing.assert_array_equal(slots.size_E, np.bincount(experts, minlength=E)[:E])
    np.testing.assert_array_equal(slots.slot_R, [real.index((e, r)) if e < E else R for r, e in enumerate(experts)])


@pytest.mark.parametrize("kernel", ["blocks", "ragged"])
def test_a_bound_on_real_assignments_saves_slots_and_changes_nothing(kernel: Any) -> None:
    experts = np.full(64, E, np.int32)
    experts[[3, 8, 9, 40, 63]] = [2, 0, 2, 3, 0]
    x = jnp.arange(64.0)[:, None]
    w = jnp.arange(1.0, E + 1)[:, None, None]
    whole, bound = (grouped(x, w, jnp.asarray(experts), kernel, limit) for limit in (64, 5))
    np.testing.assert_array_equal(bound, whole)
    np.testing.assert_array_equal(bound[:, 0], np.where(experts < E, np.arange(64) * (experts + 1.0), 0))
    sizes = [layout(jnp.asarray(experts), E, limit, kernel).assignment_N.size for limit in (64, 5)]
    assert sizes == {"blocks": [(64 // 8 + E) * 8, E * 8], "ragged": [64, 5]}[kernel]


def test_members_are_sorted_by_key_and_in_order_within_one() -> None:
    rng = np.random.default_rng(0)
    for R, keys in ((1, 1), (37, 5), (64, 3)):
        key = rng.integers(0, keys + 2, R)
        np.testing.assert_array_equal(
            order_by(jnp.asarray(key), keys), np.argsort(np.minimum(key, keys), kind="stable")
        )
    np.testing.assert_array_equal(order_by(jnp.array([2**29, 7, 2**29 - 1, 7]), 2**29), [1, 3, 2, 0])  # too many keys


def test_ragged_products_are_for_tpus_and_blocks_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolved("auto"), resolved("ragged"), resolved("blocks")) == ("blocks", "ragged", "blocks")
    for platform, kernel in (("tpu", "ragged"), ("cuda", "blocks")):
        monkeypatch.setattr(kernels, "platform", lambda: platform)  # noqa: B023
        assert resolved("auto") == kernel


def test_the_platform_is_that_of_the_mesh_in_use() -> None:
    with jax.set_mesh(jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert kernels.platform() == "cpu"


def grouped(x_RD: jax.Array, w_EDF: jax.Array, experts: jax.Array, kernel: Any, bound: int | None = None) -> jax.Array:
    """The product through slots, back in the order of the assignments."""
    slots = layout(experts, w_EDF.shape[0], bound or experts.shape[0], kernel)
    y = slots.dot(permute(x_RD, slots.assignment_N, slots.slot_R), w_EDF)
    return permute(y, slots.slot_R, slots.assignment_N)


@pytest.mark.parametrize("kernel", ["blocks", "ragged"])
@each_case
def test_the_product_and_its_gradients_equal_a_loop_over_rows(experts: list[int], kernel: Any) -> None:
    rng = np.random.default_rng(0)
    R = len(experts)
    x, w = rng.normal(size=(R, 5)).astype(np.float32), rng.normal(size=(E, 5, 3)).astype(np.float32)
    c = rng.normal(size=(R, 3)).astype(np.float32)
    ids = jnp.array(experts, jnp.int32)

    def value(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = grouped(x, w, ids, kernel)
        return (y * c).sum(), y

    (_, y), (gx, gw) = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(x, w)
    expected_y, expected_gx, expected_gw = np.zeros((R, 3)), np.zeros((R, 5)), np.zeros((E, 5, 3))
    for r, e in enumerate(experts):
        if e < E:
            expected_y[r] = x[r] @ w[e]
            expected_gx[r] = w[e] @ c[r]
            expected_gw[e] += np.outer(x[r], c[r])
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    np.testing.assert_allclose(gx, expected_gx, atol=1e-5)
    np.testing.assert_allclose(gw, expected_gw, atol=1e-5)
    for e in set(range(E)) - set(experts):
        assert not np.asarray(gw[e]).any(), "an expert without tokens has exactly no gradient"


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes_equal_ragged_dot(seed: int) -> None:
    rng = np.random.default_rng(seed)
    R, experts = 96, 6
    ids = np.sort(rng.choice(experts, R, p=rng.dirichlet(np.full(experts, 0.3))))
    x, w = rng.normal(size=(R, 8)).astype(np.float32), rng.normal(size=(experts, 8, 7)).astype(np.float32)
    expected = jax.lax.ragged_dot(jnp.asarray(x), jnp.asarray(w), jnp.bincount(jnp.asarray(ids), length=experts))
    shuffle = rng.permutation(R)
    found = grouped(jnp.asarray(x[shuffle]), jnp.asarray(w), jnp.asarray(ids[shuffle], jnp.int32), "blocks")
    np.testing.assert_allclose(found, expected[shuffle], atol=1e-5)


def test_the_gradient_of_permute_is_that_of_a_gather_with_fill() -> None:
    to = jnp.array([2, 5, 0, 9, 1], jnp.int32)  # 5 and 9 are out of range: zeros; rows 3 and 4 are taken by nobody
    back = jnp.array([2, 4, 0, 5, 5], jnp.int32)
    x, c = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (5, 3))

    def plain(x: jax.Array) -> jax.Array:
        return (jnp.take(x, to, axis=0, mode="fill", fill_value=0) * c).sum()

    a, b = jax.value_and_grad(lambda x: (permute(x, to, back) * c).sum())(x), jax.value_and_grad(plain)(x)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_array_equal(a[1], b[1])
    assert not np.asarray(a[1])[3:].any() and np.asarray(a[1])[:3].all()


def test_rows_of_a_block_are_a_power_of_two_from_8_near_a_quarter_of_the_mean_load() -> None:
    assert [block_rows(*case) for case in ((1, 8), (256, 8), (320, 8), (512, 8), (16_384, 8))] == [8, 8, 8, 16, 512]
