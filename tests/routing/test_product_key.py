"""Experts on a grid: the beam against brute force, and experts that fail.

Guards against: softmax over nothing but minus infinity (NaN), failed experts that are still chosen or still learn.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.dispatch import DenseConfig, ExpertWeights
from moe.layers.moe import MoEConfig
from moe.routing import noise
from moe.routing.base import RouterConfig, Routing
from moe.routing.product_key import ProductKey, ProductKeyConfig, beam_search
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    ProductKeyConfig(),
    ProductKeyConfig(grid=(2, 2, 2), num_selected=3),
    ProductKeyConfig(grid=(8,), num_selected=2),
    ProductKeyConfig(grid=(2, 4), num_selected=4, failure_rate=0.3),
    ProductKeyConfig(grid=(4, 2), num_selected=8),
]
B, S, D = 2, 24, 6


def router(**fields: Any) -> ProductKey:
    config = ProductKeyConfig(**fields)
    return config.build(jax.random.key(0), D, math.prod(config.grid))


def tokens() -> jax.Array:
    return 40 * jax.random.normal(jax.random.key(1), (B, S, D))


def scores(built: ProductKey) -> np.ndarray:
    """[B, S, E] by one loop over the grid."""
    flat = np.asarray(tokens(), np.float64) @ np.asarray(built.w_router[...], np.float64)
    starts = np.cumsum((0, *built.config.grid))
    columns = [
        sum(flat[..., start + u] for start, u in zip(starts, coordinates, strict=False))
        for coordinates in itertools.product(*map(range, built.config.grid))
    ]
    return np.stack(columns, axis=-1)


def route(built: ProductKey, **at: Any) -> Routing:
    return built(tokens(), context_for(B, S, **at), jnp.zeros(math.prod(built.config.grid)))


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("grid", [(4, 2), (2, 2, 2), (8,), (3, 4, 5), (2, 3, 2, 2)], ids=str)
def test_with_all_experts_alive_the_beam_finds_what_brute_force_finds(grid: tuple[int, ...], K: int) -> None:
    built = router(grid=grid, num_selected=K)
    found, z = route(built), scores(built)
    order = np.argsort(-z, axis=-1)
    np.testing.assert_array_equal(found.expert_BR.reshape(B, S, K), order[..., :K])
    best = np.take_along_axis(z, order, axis=-1)
    expected = np.apply_along_axis(softmax, -1, best[..., :K])
    np.testing.assert_allclose(found.weight_BR.reshape(B, S, K), expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.probs_BSE, np.apply_along_axis(softmax, -1, z), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.margin_BS, best[..., K - 1] - best[..., K], rtol=1e-2, atol=1e-4)
    assert built.w_router[...].shape == (D, sum(grid))


def test_of_a_dead_row_no_expert_is_chosen_and_the_others_are_still_the_best() -> None:
    built = router(grid=(4, 3), num_selected=3)
    z = scores(built)
    flat = jnp.einsum("bsd,dm->bsm", tokens(), built.w_router[...])
    alive = np.ones((B, S, 12), bool)
    alive[..., 3:6] = False  # row 1 of the grid
    expert_BSK, found_BSK = beam_search([flat[..., :4], flat[..., 4:]], jnp.asarray(alive), 3)
    assert found_BSK.all() and not np.isin(np.argsort(-z)[..., :3], [0, 1, 2, 6, 7, 8, 9, 10, 11]).all()
    np.testing.assert_array_equal(expert_BSK, np.argsort(-np.where(alive, z, -np.inf), axis=-1)[..., :3])


def slow_beam(z_parts: list[np.ndarray], alive: np.ndarray, K: int) -> list[int]:
    """One token: prefixes as tuples of coordinates, sorted in full at every level."""
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for level, part in enumerate(z_parts):
        expanded = [(score + part[u], (*prefix, u)) for score, prefix in beam for u in range(len(part))]
        living = [one for one in expanded if alive[one[1]].any()]
        beam = sorted(living, reverse=True)[:K]
        assert all(len(prefix) == level + 1 for _, prefix in beam)
    return [int(np.ravel_multi_index(prefix, alive.shape)) for _, prefix in beam]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_with_failures_it_equals_a_slow_beam_over_the_survivors(rate: float) -> None:
    grid, K = (3, 2, 2), 4
    E = math.prod(grid)
    built = router(grid=grid, num_selected=K, failure_rate=rate)
    found, z, context = route(built, padding=2), scores(built), context_for(B, S, padding=2)
    alive = np.asarray(noise.uniform(context, E) >= rate)
    parts = np.split(np.asarray(tokens(), np.float64) @ np.asarray(built.w_router[...], np.float64), (3, 5), axis=-1)
    short, none = 0, 0
    for b, s in itertools.product(range(B), range(S - 2)):
        chosen = slow_beam([part[b, s] for part in parts], alive[b, s].reshape(grid), K)
        experts, weights = (np.asarray(v).reshape(B, S, K)[b, s] for v in (found.expert_BR, found.weight_BR))
        np.testing.assert_array_equal(experts, chosen + [E] * (K - len(chosen)))
        short, none = short + (len(chosen) < K), none + (not chosen)
        living = alive[b, s].any()
        if chosen:
            np.testing.assert_allclose(weights[: len(chosen)], softmax(z[b, s, chosen]), rtol=1e-3, atol=1e-6)
        assert not weights[len(chosen) :].any()
        p = np.where(alive[b, s], np.exp(z[b, s]), 0.0)
        np.testing.assert_allclose(found.probs_BSE[b, s], p / p.sum() if living else 1 / E, rtol=1e-3, atol=1e-6)
        log_z = np.log(p.sum()) if living else 0.0
        np.testing.assert_allclose(found.log_z_BS[b, s], log_z, rtol=1e-4, atol=1e-5)
    if rate == 0.9:
        assert short > 10 and none > 5, "the case shows nothing"
    for value in (found.weight_BR, found.probs_BSE, found.log_z_BS):
        assert np.isfinite(value).all()
    assert (np.asarray(found.margin_BS) >= 0).all()


def test_prefixes_with_one_survivor_each_may_crowd_out_a_better_one() -> None:
    """The declared limit of the beam under failures: 5 = (2, 1) with score 1 + 9 lives, and is not found."""
    parts = [jnp.array([[[3.0, 2.0, 1.0]]]), jnp.array([[[0.0, 9.0]]])]
    alive = jnp.array([[[True, False, True, False, True, True]]])
    np.testing.assert_array_equal(beam_search(parts, alive, 2)[0], [[[0, 2]]])
    np.testing.assert_array_equal(beam_search(parts, alive, 3)[0], [[[5, 0, 2]]])


def test_experts_fail_at_their_rate_in_training_and_not_in_evaluation() -> None:
    fields: dict[str, Any] = {"grid": (4, 4), "num_selected": 16}
    alive = np.asarray(route(router(failure_rate=0.3, **fields)).expert_BR) < 16
    assert abs(alive.mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / alive.size)
    plain = route(router(**fields))
    assert (plain.expert_BR < 16).all()
    jax.tree.map(np.testing.assert_array_equal, route(router(failure_rate=0.3, **fields), train=False), plain)


def test_failed_experts_get_exactly_no_gradient() -> None:
    """Grid (E,): a coordinate is an expert, so the router's columns of failed experts must stay as they are too."""
    E, F = 8, 4
    built = router(grid=(E,), num_selected=4, failure_rate=0.5)
    keys = jax.random.split(jax.random.key(4), 3)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = ExpertWeights(*(0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))
    context, x = context_for(1, 1), jax.random.normal(jax.random.key(2), (1, 1, D))

    def loss(params: Any, weights: ExpertWeights) -> jax.Array:
        routing = param.bind(built, params)(x, context, jnp.zeros(E))
        y, _ = DenseConfig().build()(x, routing, weights)
        return jnp.square(y).sum() + jnp.square(routing.probs_BSE).sum() + routing.log_z_BS.sum()

    router_gradient, expert_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(param.pure(built), weights)
    alive = np.asarray(noise.uniform(context, E) >= 0.5)[0, 0]
    assert 1 < alive.sum() < E
    learned = np.abs(router_gradient["w_router"]).max(axis=0) > 0
    np.testing.assert_array_equal(learned, alive)
    for leaf in expert_gradient:
        assert not np.asarray(leaf)[~alive].any()


def test_gradients_are_finite_where_every_expert_failed() -> None:
    built = router(grid=(2, 2), num_selected=2, failure_rate=0.95)

    def everything(params: Any) -> jax.Array:
        found = param.bind(built, params)(tokens(), context_for(B, S), jnp.zeros(4))
        return (found.weight_BR**2).sum() + (found.probs_BSE**2).sum() + (found.log_z_BS**2).sum()

    found = route(built)
    assert (np.asarray(found.expert_BR).reshape(B, S, 2) == 4).all(axis=-1).any(), "no token lost every expert"
    assert np.isfinite(jax.jit(jax.grad(everything))(param.pure(built))["w_router"]).all()


def test_grids_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router.grid = \(4, 2\): its product is 8 and must be num_experts = 6"):
        check(MoEConfig(num_experts=6, router=ProductKeyConfig()))
    with pytest.raises(ConfigError, match=r"grid = \(8, 1\): must have at least one dimension, each of at least 2"):
        check(ProductKeyConfig(grid=(8, 1)))
    with pytest.raises(ConfigError, match=r"num_selected = 1: must be at least 2"):
        check(ProductKeyConfig(num_selected=1))
    with pytest.raises(ConfigError, match=r"failure_rate = 1.0: must be at least 0 and less than 1"):
        check(ProductKeyConfig(failure_rate=1.0))
