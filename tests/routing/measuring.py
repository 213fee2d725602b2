"""Measuring what a router decides: compiled once for each config, and experts once for all routings of one shape."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe import param
from moe.dispatch import DenseConfig, DispatchConfig, ExpertWeights
from moe.layers.moe import _through_slots
from moe.routing.base import Context, Router, RouterConfig, Routing

B, S, D, EXPERTS, HIDDEN = 8, 12, 16, 8, 4
WEIGHT_STD = 0.4


@functools.cache
def built(config: RouterConfig, E: int) -> Router:
    """The router with matrices large enough that it prefers some experts."""
    router = config.build(jax.random.key(0), D, E)
    sized = lambda w: w * (WEIGHT_STD / w.std()) if w.ndim > 1 and w.std() > 0 else w  # noqa: E731
    return param.bind(router, jax.tree.map(sized, param.pure(router)))


@functools.cache
def compiled(config: RouterConfig, E: int) -> Any:
    router = built(config, E)
    return jax.jit(lambda x, context, bias_E: router(x, context, bias_E))


def route(config: RouterConfig, E: int, x: jax.Array, context: Context, bias_E: Any = None) -> Routing:
    bias_E = jnp.zeros(E) if bias_E is None else jnp.asarray(bias_E, jnp.float32)
    return jax.device_get(compiled(config, E)(x, context, bias_E))  # type: ignore[no-any-return]


def tokens(seed: int = 1, positions: int = S) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, positions, D))


def expert_weights(E: int) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(4), 3)
    shapes = ((E, D, HIDDEN), (E, D, HIDDEN), (E, HIDDEN, D))
    return ExpertWeights(*(0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def differentiable(routing: Routing) -> Any:
    """What a task can teach a router through."""
    return routing.weight_BR, routing.slots


@functools.cache
def _through(dispatcher: DispatchConfig) -> Any:
    """x, differentiable(routing), expert weights, routing -> ((loss, (y, dropped)), gradients); no balance rule."""

    def loss(x: jax.Array, floats: Any, weights: ExpertWeights, routing: Routing) -> Any:
        routing = dataclasses.replace(routing, weight_BR=floats[0], slots=floats[1])
        y, dropped = _through_slots(dispatcher.build(), x, routing, weights)
        return (jnp.sin(3 * y) * jnp.cos(x)).sum(), (y, dropped)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def experts(dispatcher: DispatchConfig, x: jax.Array, routing: Routing, weights: ExpertWeights) -> Any:
    """`_through` compiled once for all routers with assignments of one shape."""
    bare = dataclasses.replace(routing, priority_BR=None, select_BSE=None)
    return jax.device_get(_through(dispatcher)(x, differentiable(routing), weights, bare))


def by_token(routing: Routing, E: int) -> np.ndarray:
    """[B, S, E] combine weights, 0 where an expert was not chosen; of slots, summed with what each token receives."""
    B, S = routing.probs_BSE.shape[:2]
    places = S if routing.slots is None else routing.slots.gather_BPS.shape[1]
    out = np.zeros((B, places, E + 1))
    for b in range(B):
        np.add.at(out[b], (routing.token_BR[b], routing.expert_BR[b]), routing.weight_BR[b])
    return out[..., :E] if routing.slots is None else np.einsum("bsp,bpe->bse", routing.slots.scatter_BSP, out[..., :E])


def seen(routing: Routing, E: int, x: jax.Array) -> dict[str, np.ndarray]:
    """What a routing decides about every token, [B, S, ...] each; the output of its experts stands for all of it."""
    (_, (y, _)), _ = experts(DenseConfig(), x, routing, expert_weights(E))
    names = ("probs_BSE", "log_z_BS", "margin_BS")
    return {"weights": by_token(routing, E), "y": y, **{name: np.asarray(getattr(routing, name)) for name in names}}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], what: str, where: Any = np.s_[:]) -> None:
    for name, value in a.items():
        tolerance = 1e-5 if name == "y" else 1e-6
        np.testing.assert_allclose(value[where], b[name][where], tolerance, tolerance, err_msg=f"{what}: {name}")


def differs(a: dict[str, np.ndarray], b: dict[str, np.ndarray], where: Any = np.s_[:]) -> bool:
    return any(not np.allclose(a[name][where], b[name][where], atol=1e-4) for name in ("weights", "y"))


def close(found: Any, expected: Any, what: str) -> None:
    """||a - b|| <= 1e-5 ||b|| for every leaf; a little absolute for gradients that are 0."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= 1e-5 * size + 1e-6, f"{what}{jax.tree_util.keystr(path)}: off by {error:.2g} of {size:.2g}"
