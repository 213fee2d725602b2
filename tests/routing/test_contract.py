"""What every router promises. A new router is met here without a line: its config is found by its base class.

A router whose default config is not a fair example may add its variants to VARIANTS.

Guards against: padding counted in f and P (MaxText, Levanter, AXLearn), routers that see the future in a decoder,
auxiliary losses as the only gradient of a router, noise or ties that depend on the number of devices.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe.routing
from moe import axes, param
from moe.axes import MeshConfig
from moe.balance.statistics import load, statistics
from moe.dispatch import CapacityConfig, DenseConfig, DroplessConfig, ExpertWeights, dispatch
from moe.routing.base import Context, Router, RouterConfig, Routing
from tests import grid
from tests.routing.contexts import context_for

B, S, D, E, F = 8, 12, 16, 8, 8
PADDING = 3

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "TopKConfig": [
        {"num_selected": 1},
        {"num_selected": 2, "normalise": "sum"},
        {"num_selected": 3, "score": "sigmoid", "normalise": "sum", "scale": 2.5},
        {"num_selected": 2, "score": "sigmoid"},
        {"num_selected": E, "normalise": "softmax"},
    ]
}


def config_types(base: type[RouterConfig] = RouterConfig) -> Iterator[type[RouterConfig]]:
    for module in pkgutil.iter_modules(moe.routing.__path__):
        importlib.import_module(f"moe.routing.{module.name}")
    for cls in base.__subclasses__():
        if cls.__module__.startswith("moe."):
            yield cls
        yield from config_types(cls)


CONFIGS = [cls(**v) for cls in dict.fromkeys(config_types()) for v in [{}, *VARIANTS.get(cls.__name__, [])]]
each_router = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{CONFIGS.index(c)}")


@functools.cache
def built(config: RouterConfig) -> Router:
    """The router with weights large enough that it prefers some experts."""
    router = config.build(jax.random.key(0), D, E)
    return param.bind(router, jax.tree.map(lambda w: 20 * w if w.std() else w, param.pure(router)))


@functools.cache
def compiled(config: RouterConfig) -> Any:
    """x, context -> Routing, without bias."""
    router = built(config)
    return jax.jit(lambda x, context: router(x, context, jnp.zeros(E)))


def tokens(seed: int = 1, batch: int = B, positions: int = S) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, positions, D))


def by_token(routing: Routing) -> np.ndarray:
    """[B, S, E] combine weights, 0 where an expert was not chosen."""
    out = np.zeros((*routing.probs_BSE.shape[:2], E + 1))
    for b in range(out.shape[0]):
        np.add.at(
            out[b],
            (np.asarray(routing.token_BR[b]), np.asarray(routing.expert_BR[b])),
            np.asarray(routing.weight_BR[b]),
        )
    return out[..., :E]


def same(a: Routing, b: Routing, where: Any = np.s_[:], atol: float = 0.0) -> None:
    np.testing.assert_allclose(by_token(a)[where], by_token(b)[where], atol=atol)
    for name in ("probs_BSE", "log_z_BS", "margin_BS"):
        np.testing.assert_allclose(getattr(a, name)[where], getattr(b, name)[where], atol=atol, err_msg=name)


@each_router
def test_shapes_ranges_and_dtypes(config: RouterConfig) -> None:
    for x in (tokens(), tokens().astype(jnp.bfloat16)):
        routing = compiled(config)(x, context_for(B, S, padding=PADDING))
        R = routing.token_BR.shape[1]
        assert routing.token_BR.shape == routing.expert_BR.shape == routing.weight_BR.shape == (B, R)
        assert routing.token_BR.dtype == routing.expert_BR.dtype == jnp.int32
        assert routing.weight_BR.dtype == routing.probs_BSE.dtype == routing.log_z_BS.dtype == jnp.float32
        assert routing.probs_BSE.shape == (B, S, E) and routing.log_z_BS.shape == routing.margin_BS.shape == (B, S)
        assert ((routing.token_BR >= 0) & (routing.token_BR < S)).all()
        assert ((routing.expert_BR >= 0) & (routing.expert_BR <= E)).all()
        assert np.isfinite(routing.weight_BR).all() and np.isfinite(routing.probs_BSE).all()
        assert (np.asarray(routing.margin_BS) >= 0).all()
        if routing.num_selected is not None:
            assert S * routing.num_selected == R
            np.testing.assert_array_equal(routing.token_BR[0], np.repeat(np.arange(S), routing.num_selected))
            experts = np.sort(np.asarray(routing.expert_BR).reshape(B, S, -1)[:, : S - PADDING], axis=-1)
            assert (np.diff(experts, axis=-1) > 0).all(), "an expert is chosen twice"


@each_router
def test_the_number_of_assignments_is_static_under_jit(config: RouterConfig) -> None:
    router = built(config)
    run = jax.jit(lambda x, context: router(x, context, jnp.zeros(E)))
    same(run(tokens(), context_for(B, S)), router(tokens(), context_for(B, S), jnp.zeros(E)), atol=1e-5)


@each_router
def test_padding_is_void_and_probabilities_sum_to_one(config: RouterConfig) -> None:
    context = context_for(B, S, padding=PADDING)
    routing = compiled(config)(tokens(), context)
    real = np.asarray(context.mask_BS)
    void = ~np.take_along_axis(real, np.asarray(routing.token_BR), axis=1)
    assert (np.asarray(routing.expert_BR)[void] == E).all() and not np.asarray(routing.weight_BR)[void].any()
    np.testing.assert_allclose(routing.probs_BSE.sum(axis=-1), real, atol=1e-6)
    assert not np.asarray(routing.log_z_BS)[~real].any() and np.isinf(np.asarray(routing.margin_BS)[~real]).all()
    sums = statistics(routing, context.mask_BS, jnp.zeros((B,), jnp.int32))
    np.testing.assert_allclose(load(sums.count_BE).sum(axis=-1), 1.0, rtol=1e-6)
    assert int(sums.count_BE.sum()) == int((routing.expert_BR < E).sum())
    np.testing.assert_array_equal(sums.tokens_B, real.sum(axis=1))


@each_router
def test_the_content_of_padding_changes_nothing(config: RouterConfig) -> None:
    context, router = context_for(B, S, padding=PADDING), compiled(config)
    a = router(tokens(), context)
    b = router(tokens().at[:, S - PADDING :].add(100.0), context)
    same(a, b)


@each_router
def test_appended_padding_changes_nothing(config: RouterConfig) -> None:
    router = compiled(config)
    a = router(tokens(), context_for(B, S))
    more = dataclasses.replace(
        context_for(B, S + 4),
        segment_BS=jnp.pad(context_for(B, S).segment_BS, ((0, 0), (0, 4))),
        position_BS=jnp.pad(context_for(B, S).position_BS, ((0, 0), (0, 4))),
    )
    b = router(jnp.concatenate([tokens(), tokens(2, positions=4)], axis=1), more)
    same(a, jax.tree.map(lambda leaf: leaf[:, : leaf.shape[1] - 4 * (leaf.shape[1] // (S + 4))], b), atol=1e-6)


@each_router
def test_a_causal_router_does_not_see_later_tokens(config: RouterConfig) -> None:
    router = built(config)
    if not router.causal:
        pytest.skip("declared not causal")
    a = compiled(config)(tokens(), context_for(B, S))
    b = compiled(config)(tokens().at[:, 7:].add(3.0), context_for(B, S))
    same(a, b, np.s_[:, :7], atol=1e-6)
    assert not np.allclose(by_token(a)[:, 7:], by_token(b)[:, 7:])


def weights(seed: int = 4) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    return ExpertWeights(*(0.3 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)))


def task_gradient(config: RouterConfig, dispatcher: Any, context: Context) -> Any:
    """Value and gradient of a task loss in (router parameters, x, expert weights); no balance rule anywhere."""
    router = built(config)

    def loss(params: Any, x: jax.Array, w: ExpertWeights) -> jax.Array:
        routing = param.bind(router, params)(x, context, jnp.zeros(E))
        y, _ = dispatch(dispatcher.build(), x, routing, w)
        return (jnp.sin(3 * y) * jnp.cos(x)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(param.pure(router), tokens(), weights())


@each_router
@pytest.mark.parametrize("other", [DroplessConfig(), CapacityConfig(capacity_factor=E)], ids=["dropless", "capacity"])
def test_the_task_teaches_the_router_and_dispatchers_agree(config: RouterConfig, other: Any) -> None:
    context = context_for(B, S, padding=PADDING)
    value, gradient = task_gradient(config, DenseConfig(), context)
    if config.num_selected < E or getattr(config, "normalise", "none") != "none":
        assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(gradient[0])), "no task gradient"
    found_value, found = task_gradient(config, other, context)
    grid.close(found_value, value, "value")
    grid.close_trees(found, gradient, "gradient")


@each_router
def test_renaming_experts_renames_everything_and_changes_no_output(config: RouterConfig) -> None:
    router, context = built(config), context_for(B, S, padding=PADDING)
    order = np.random.default_rng(0).permutation(E)
    renamed = jax.tree.map(lambda w: w[..., order] if w.shape[-1] == E else w, param.pure(router))
    a, b = router(tokens(), context, jnp.zeros(E)), param.bind(router, renamed)(tokens(), context, jnp.zeros(E))
    np.testing.assert_allclose(by_token(a)[..., order], by_token(b), atol=1e-6)
    np.testing.assert_allclose(a.probs_BSE[..., order], b.probs_BSE, atol=1e-6)
    np.testing.assert_allclose(a.margin_BS, b.margin_BS, atol=1e-6)
    dense = DenseConfig().build()
    y, _ = dense(tokens(), a, weights())
    z, _ = dense(tokens(), b, ExpertWeights(*(w[order] for w in weights())))
    np.testing.assert_allclose(y, z, atol=1e-5)


@each_router
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_any_number_of_devices_routes_the_same(config: RouterConfig, devices: int) -> None:
    router, context = built(config), context_for(B, S, padding=PADDING)
    expected = compiled(config)(tokens(), context)
    mesh = axes.make_mesh(MeshConfig(data=-1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        cut = axes.sharding(mesh, ("batch",))
        x = jax.device_put(tokens(), cut)
        here = jax.tree.map(
            lambda leaf: jax.device_put(leaf, cut) if leaf.ndim and leaf.shape[0] == B else leaf, context
        )
        routing = jax.jit(lambda x, context: router(x, context, jnp.zeros(E)))(x, here)
    np.testing.assert_array_equal(routing.expert_BR, expected.expert_BR)
    same(jax.device_get(routing), expected, atol=1e-6)


def test_every_router_of_the_package_is_met() -> None:
    assert {type(config).__name__ for config in CONFIGS} >= {"TopKConfig"}
