"""Every dispatcher on every mesh gives the dense oracle's outputs and gradients.

Guards against: expert gradients times the expert-parallel degree (DeepSpeed #5618, pytorch #160285), experts that
silently never train (Megatron PR #6228), wrong gradients beside empty experts (tokamax #887), both expert-parallel
ranks holding the same experts (DeepSpeed #6589), values typed as replicated that are not (MaxText, `check_vma`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.dispatch import CapacityConfig, DenseConfig, DispatchConfig, DroplessConfig, ExpertWeights, dispatch
from moe.dispatch.sharded import WEIGHT_AXES
from moe.routing.base import Routing
from tests.grid import close, close_trees

B, S, D, E, F, K = 8, 6, 8, 8, 4, 2
EXACT: dict[str, DispatchConfig] = {
    "dense": DenseConfig(), "dropless": DroplessConfig(), "capacity": CapacityConfig(capacity_factor=float(E)),
}  # fmt: skip
MESHES = {
    "none": None,
    "1 device": {"data": 1},
    "data 2": {"data": 2},
    "expert 2": {"expert": 2},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "2 2 2 1": {"data": 2, "fsdp": 2, "expert": 2},
    "1 2 2 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "2 1 2 2": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp 2 tensor 4": {"fsdp": 2, "tensor": 4},
}


def expert_weights(seed: int = 0) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    return ExpertWeights(*(0.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)))


def token_choice(case: str, weight_BR: jax.Array) -> Routing:
    """K assignments a token, in order; some void. 'ragged' has another order and no static K."""
    rng = np.random.default_rng(1)
    token = np.broadcast_to(np.repeat(np.arange(S), K), (B, S * K))
    experts = np.stack([np.stack([rng.permutation(E)[:K] for _ in range(S)]) for _ in range(B)]).reshape(B, S * K)
    if case == "two experts":
        experts = np.broadcast_to(np.tile([3, 5], S), (B, S * K))
    if case == "padded":
        experts = np.where((token >= 4) | (np.arange(B)[:, None] == 2), E, experts)
    if case == "ragged":  # tokens with no, one or many assignments, in any order
        token, experts = rng.integers(0, S, (B, S * K)), rng.integers(0, E + 1, (B, S * K))
    weight_BR = jnp.where(experts < E, weight_BR, 0.0)
    return Routing(
        token_BR=jnp.asarray(token, jnp.int32), expert_BR=jnp.asarray(experts, jnp.int32), weight_BR=weight_BR,
        probs_BSE=jnp.full((B, S, E), 1 / E), log_z_BS=jnp.zeros((B, S)), margin_BS=jnp.ones((B, S)),
        num_selected=None if case == "ragged" else K,
    )  # fmt: skip


def run(config: DispatchConfig, case: str, mesh_sizes: dict[str, int] | None) -> tuple[Any, Any]:
    return _run(config, case, None if mesh_sizes is None else tuple(mesh_sizes.items()))


@functools.cache
def _run(config: DispatchConfig, case: str, mesh_items: tuple[tuple[str, int], ...] | None) -> tuple[Any, Any]:
    """(outputs, gradients in x, combine weights and expert weights) of a function of all outputs."""
    x = jax.random.normal(jax.random.key(5), (B, S, D))
    combine = jax.random.uniform(jax.random.key(6), (B, S * K), minval=0.1)
    target = jax.random.normal(jax.random.key(7), (B, S, D))
    inputs: tuple[Any, ...] = (x, combine, expert_weights())

    def loss(x: jax.Array, combine: jax.Array, weights: ExpertWeights) -> Any:
        y, dropped = dispatch(config.build(), x, token_choice(case, combine), weights)
        return (y * target).sum() + (y**2).sum(), (y, dropped)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    if mesh_items is None:
        (_, out), grads = step(*inputs)
        return jax.device_get((out, grads))
    mesh_sizes = dict(mesh_items)
    mesh = axes.make_mesh(
        MeshConfig(**({"data": 1} | mesh_sizes)), jax.devices()[: int(np.prod(list(mesh_sizes.values())))]
    )
    where = (axes.sharding(mesh, ("batch",)),) * 2 + (ExpertWeights(*(axes.sharding(mesh, a) for a in WEIGHT_AXES)),)
    with jax.set_mesh(mesh):
        (_, out), grads = step(*jax.device_put(inputs, where))
    return jax.device_get((out, grads))


def loop(case: str) -> np.ndarray:
    """The output one assignment at a time."""
    x = np.asarray(jax.random.normal(jax.random.key(5), (B, S, D)), np.float64)
    routing = token_choice(case, jax.random.uniform(jax.random.key(6), (B, S * K), minval=0.1))
    gate, up, down = (np.asarray(w, np.float64) for w in expert_weights())
    y = np.zeros((B, S, D))
    for b in range(B):
        for t, e, w in zip(
            *(np.asarray(a[b]) for a in (routing.token_BR, routing.expert_BR, routing.weight_BR)), strict=True
        ):
            if e < E:
                h = x[b, t] @ gate[e]
                y[b, t] += w * ((h / (1 + np.exp(-h)) * (x[b, t] @ up[e])) @ down[e])
    return y


@pytest.mark.parametrize("case", ["full", "padded", "two experts", "ragged"])
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT.keys())
def test_every_exact_dispatcher_equals_the_loop_and_the_dense_gradient(config: DispatchConfig, case: str) -> None:
    (y, dropped), grads = run(config, case, None)
    close(y, loop(case), "y")
    assert not dropped.any()
    close_trees(grads, run(DenseConfig(), case, None)[1], "gradient")


@pytest.mark.parametrize("sizes", [s for s in MESHES.values() if s], ids=[n for n, s in MESHES.items() if s])
def test_dropless_over_a_mesh_equals_dense_without_one(sizes: dict[str, int]) -> None:
    (y, dropped), grads = run(DroplessConfig(), "padded", sizes)
    (expected, _), expected_grads = run(DenseConfig(), "padded", None)
    close(y, expected, "y")
    close_trees(grads, expected_grads, "gradient")
    assert not dropped.any()


@pytest.mark.parametrize("name", ["expert 8", "1 2 2 2"])
@pytest.mark.parametrize("case", ["two experts", "ragged"])
def test_uneven_assignments_over_a_mesh_equal_dense_without_one(case: str, name: str) -> None:
    for config in EXACT.values():
        (y, _), grads = run(config, case, MESHES[name])
        (expected, _), expected_grads = run(DenseConfig(), case, None)
        close(y, expected, "y")
        close_trees(grads, expected_grads, "gradient")


@pytest.mark.parametrize("keep", ["order", "score"])
@pytest.mark.parametrize("name", ["data 8", "expert 8", "1 2 2 2"])
def test_a_mesh_drops_what_one_device_drops(name: str, keep: Any) -> None:
    config = CapacityConfig(capacity_factor=0.5, keep=keep)
    (y, dropped), grads = run(config, "two experts", MESHES[name])
    (expected, expected_dropped), expected_grads = run(config, "two experts", None)
    assert expected_dropped.sum() > 0
    np.testing.assert_array_equal(dropped, expected_dropped)
    close(y, expected, "y")
    close_trees(grads, expected_grads, "gradient")


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT.keys())
def test_experts_without_tokens_get_no_gradient_and_all_others_some(config: DispatchConfig) -> None:
    for name in ("none", "expert 8"):
        _, (_, _, weights) = run(config, "two experts", MESHES[name])
        moved = [{e for e in range(E) if np.abs(w[e]).max() > 0} for w in weights]
        assert moved == [{3, 5}] * 3
        _, (_, _, weights) = run(config, "full", MESHES[name])
        assert all((np.abs(w).max(axis=(1, 2)) > 0).all() for w in weights)


def test_the_combine_weight_scales_the_output_linearly() -> None:
    x, w = jax.random.normal(jax.random.key(5), (B, S, D)), expert_weights()
    for config in EXACT.values():
        one, _ = config.build()(x, token_choice("full", jnp.ones((B, S * K))), w)
        three, _ = config.build()(x, token_choice("full", 3 * jnp.ones((B, S * K))), w)
        np.testing.assert_allclose(three, 3 * one, rtol=1e-5, atol=1e-6)


def test_outputs_have_the_dtype_of_the_tokens() -> None:
    for config in EXACT.values():
        x, w = jnp.ones((B, S, D), jnp.bfloat16), ExpertWeights(*(w.astype(jnp.bfloat16) for w in expert_weights()))
        y, dropped = config.build()(x, token_choice("padded", jnp.ones((B, S * K))), w)
        assert y.dtype == jnp.bfloat16 and dropped.dtype == jnp.int32 and dropped.shape == (B,)
        assert not np.asarray(y, np.float32)[:, 4:].any(), "padding gets nothing"
