"""Soft MoE through the whole layer, against a loop over slots and tokens.

Guards against: padding in either softmax, 0 / 0 in a sequence of padding alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.dispatch import CapacityConfig, DenseConfig, DispatchConfig, DroplessConfig
from moe.layers.moe import MoE, MoEConfig
from moe.routing.base import Context, RouterConfig, Routing
from moe.routing.soft_moe import SoftMoE, SoftMoEConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    SoftMoEConfig(),
    SoftMoEConfig(slots_per_expert=2),
    SoftMoEConfig(slots_per_expert=3, normalise=True),
]
B, S, D, E, F = 2, 7, 6, 4, 5


def tokens() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)


def router(**fields: Any) -> SoftMoE:
    return SoftMoEConfig(init_std=1.0, **fields).build(jax.random.key(0), D, E)


def route(built: SoftMoE, x: Any = None, context: Context | None = None) -> Routing:
    return built(jnp.asarray(tokens() if x is None else x), context or context_for(B, S), jnp.zeros(E))


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum()


def mlp(x: np.ndarray, params: Any, expert: int) -> np.ndarray:
    gate, up, down = (np.asarray(params[name][expert], np.float64) for name in ("w_gate", "w_up", "w_down"))
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


@pytest.mark.parametrize("dispatch", [DenseConfig(), DroplessConfig(), CapacityConfig(capacity_factor=1.0)], ids=str)
@pytest.mark.parametrize("normalise", [False, True])
def test_the_layer_equals_a_loop_over_slots_and_tokens(dispatch: DispatchConfig, normalise: bool) -> None:
    N, padding = 2, 3
    config = SoftMoEConfig(slots_per_expert=N, normalise=normalise, init_std=1.0)
    layer = MoE(
        MoEConfig(num_experts=E, expert_hidden=F, router=config, dispatch=dispatch), jax.random.key(0), D, 0.5, 0.5
    )
    params = param.pure(layer)
    if normalise:
        params["router"]["scale"] = jnp.float32(2.5)
    layer, x, context = param.bind(layer, params), tokens(), context_for(B, S, padding=padding)
    y, sums = jax.jit(lambda x: layer(x, context, jnp.zeros(E)))(jnp.asarray(x))

    phi, expected = np.asarray(params["router"]["w_slots"], np.float64).reshape(D, E * N), np.zeros((B, S, D))
    probs, z_squares = np.zeros((B, E)), np.zeros(B)
    for b in range(B):
        real = x[b, : S - padding].astype(np.float64)
        z = real @ phi
        if normalise:
            z = 2.5 * z / np.linalg.norm(real, axis=1)[:, None] / np.linalg.norm(phi, axis=0)
        outputs = [mlp(softmax(z[:, p]) @ real, params, p // N) for p in range(E * N)]
        for s in range(S - padding):
            scatter = softmax(z[s])
            expected[b, s] = sum(weight * output for weight, output in zip(scatter, outputs, strict=True))
            probs[b] += scatter.reshape(E, N).sum(axis=1)
            z_squares[b] += np.log(np.exp(z[s]).sum()) ** 2
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums.prob_BE, probs, rtol=1e-4)
    np.testing.assert_allclose(sums.z_B, z_squares, rtol=1e-4)
    np.testing.assert_array_equal(sums.count_BE, np.full((B, E), N))
    np.testing.assert_array_equal(sums.dropped_B, [0, 0])


def test_slots_and_tokens_are_averages_of_real_tokens_and_of_slots() -> None:
    padding = 3
    slots = route(router(slots_per_expert=2), context=context_for(B, S, padding=padding)).slots
    assert slots is not None and slots.gather_BPS.shape == (B, 2 * E, S) and slots.scatter_BSP.shape == (B, S, 2 * E)
    np.testing.assert_allclose(slots.gather_BPS.sum(axis=-1), np.ones((B, 2 * E)), rtol=1e-6)
    real = np.arange(S) < S - padding
    np.testing.assert_allclose(slots.scatter_BSP.sum(axis=-1), np.tile(real, (B, 1)), rtol=1e-6)
    assert not np.asarray(slots.gather_BPS)[..., ~real].any()


def test_a_sequence_of_padding_alone_is_void_and_finite() -> None:
    built, padding = router(normalise=True), context_for(B, S, padding=S)

    def everything(params: Any) -> jax.Array:
        found = param.bind(built, params)(jnp.asarray(tokens()), padding, jnp.zeros(E))
        assert found.slots is not None
        return sum(jnp.square(leaf).sum() for leaf in (found.probs_BSE, found.log_z_BS, *jax.tree.leaves(found.slots)))

    found = route(built, context=padding)
    assert (found.expert_BR == E).all() and not found.weight_BR.any() and not found.probs_BSE.any()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found.slots))
    value, gradient = jax.jit(jax.value_and_grad(everything))(param.pure(built))
    assert value == 0.0
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.zeros(leaf.shape)), gradient)


def test_normalised_scores_see_directions_alone() -> None:
    scaled = tokens() * np.linspace(0.1, 30, S, dtype=np.float32)[:, None]
    for normalise in (True, False):
        built = router(normalise=normalise)
        longer = param.bind(built, param.pure(built) | {"w_slots": 7 * built.w_slots[...]})
        a, b = route(built).probs_BSE, route(longer, scaled).probs_BSE
        assert np.allclose(a, b, atol=1e-5) == normalise
    first = lambda x: route(router(normalise=True), x).probs_BSE[..., 0].sum()  # noqa: E731
    zero = jax.jit(jax.grad(first))(jnp.zeros((B, S, D)))
    assert np.isfinite(zero).all()


def test_sequences_do_not_mix() -> None:
    built, x = router(), tokens()
    together = route(built)
    other = x.copy()
    other[1] += 3.0
    changed = route(built, other)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    assert not np.allclose(together.probs_BSE[1], changed.probs_BSE[1])


def test_it_declares_that_later_tokens_are_read() -> None:
    assert not SoftMoEConfig.causal and SoftMoEConfig.padding_invariant
    x = tokens()
    x[:, -1] += 3.0
    a, b = route(router()).slots, route(router(), x).slots
    assert a is not None and b is not None
    assert np.abs(a.gather_BPS - b.gather_BPS)[..., :-1].max() > 0.01


def test_the_work_is_counted_by_slots_and_not_by_tokens() -> None:
    layer = MoEConfig(num_experts=4, expert_hidden=8, router=SoftMoEConfig(slots_per_expert=2))
    assert layer.multiply_adds(16, 32) == 3 * 16 * 8 * (4 * 2) / 32 and layer.active_share == 1.0


def test_no_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"slots_per_expert = 0: must be at least 1"):
        check(SoftMoEConfig(slots_per_expert=0))
