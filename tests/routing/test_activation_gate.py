"""Activation on the logits: which scales of the parameters it can tell apart, and how sharp it can be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.activation_gate import ActivationGate, ActivationGateConfig
from moe.routing.base import RouterConfig, Routing
from moe.routing.temperature import TemperatureConfig
from moe.routing.topk import TopKConfig
from tests.routing.contexts import context_for


def constant(tau: float) -> TemperatureConfig:
    return TemperatureConfig(start=tau, end=tau)


EXAMPLES: list[RouterConfig] = [
    ActivationGateConfig(),
    ActivationGateConfig(activation="identity", temperature=constant(0.5), normalise="sum"),
    ActivationGateConfig(activation="relu", temperature=TemperatureConfig(decay_steps=10)),
    ActivationGateConfig(activation="gelu", learned=True, temperature=constant(0.7)),
    ActivationGateConfig(activation="tanh", temperature=constant(0.2), num_selected=1),
    ActivationGateConfig(activation="sigmoid", temperature=constant(0.1), num_selected=3, normalise="sum"),
]
B, S, D, E = 2, 6, 8, 5
HOMOGENEOUS, OTHERS = ("identity", "relu"), ("silu", "gelu", "tanh", "sigmoid")
X = np.random.default_rng(1).normal(size=(B, S, D)).astype(np.float32)
W = np.random.default_rng(2).normal(0, 0.5, (D, E)).astype(np.float32)
BIAS = np.random.default_rng(3).normal(0, 0.5, E).astype(np.float32)


def gate(w: Any = W, bias: Any = BIAS, **fields: Any) -> ActivationGate:
    built = ActivationGateConfig(**fields).build(jax.random.key(0), w.shape[0], w.shape[1])
    params = {"w_router": jnp.asarray(w), "bias": jnp.asarray(bias)}
    return param.bind(built, param.pure(built) | params)


def route(built: ActivationGate, x: Any = X, step: int = 5) -> Routing:
    x = jnp.asarray(x)
    context = dataclasses.replace(context_for(x.shape[0], x.shape[1]), step=jnp.int32(step))
    return built(x, context, jnp.zeros(built.w_router[...].shape[1]))


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


ORACLES = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}


@pytest.mark.parametrize("normalise", ["none", "sum"])
@pytest.mark.parametrize("activation", ORACLES)
def test_probabilities_choices_and_weights_equal_numpy(activation: Any, normalise: Any) -> None:
    found = route(gate(activation=activation, temperature=constant(0.3), normalise=normalise, num_selected=2))
    logits = (ORACLES[activation](X.astype(np.float64) @ W) + BIAS) / 0.3
    p = softmax(logits)
    np.testing.assert_allclose(found.probs_BSE, p, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.log_z_BS, np.log(np.exp(logits).sum(axis=-1)), rtol=1e-5)
    order = np.argsort(-p, axis=-1)
    np.testing.assert_array_equal(found.expert_BR.reshape(B, S, 2), order[..., :2])
    best = np.take_along_axis(p, order, axis=-1)
    expected = best[..., :2] / (best[..., :2].sum(axis=-1, keepdims=True) if normalise == "sum" else 1.0)
    np.testing.assert_allclose(found.weight_BR.reshape(B, S, 2), expected, rtol=1e-4)
    np.testing.assert_allclose(found.margin_BS, best[..., 1] - best[..., 2], rtol=1e-3, atol=1e-6)


def test_the_identity_is_the_plain_router_at_a_temperature() -> None:
    plain = TopKConfig(num_selected=2).build(jax.random.key(0), D, E)
    for tau in (1.0, 0.25):
        a = route(gate(bias=np.zeros(E, np.float32), activation="identity", temperature=constant(tau)))
        b = param.bind(plain, {"w_router": jnp.asarray(W / tau)})(jnp.asarray(X), context_for(B, S), jnp.zeros(E))
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.parametrize("activation", HOMOGENEOUS + OTHERS)
def test_scaling_weights_bias_and_temperature_together_is_seen_only_through_a_curved_activation(
    activation: Any,
) -> None:
    p = route(gate(activation=activation, temperature=constant(0.5))).probs_BSE
    q = route(gate(w=3 * W, bias=3 * BIAS, activation=activation, temperature=constant(1.5))).probs_BSE
    if activation in HOMOGENEOUS:
        np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-6)
    else:
        assert np.abs(p - q).max() > 0.02


@pytest.mark.parametrize("activation", HOMOGENEOUS + OTHERS)
def test_the_temperature_is_a_direction_of_the_weights_only_without_a_curved_activation(activation: Any) -> None:
    """tau dp/dtau = - (W . dp/dW + b . dp/db): the equation that makes a learned temperature unidentifiable."""
    built = gate(activation=activation, learned=True, temperature=constant(0.7))
    params, context = param.pure(built), context_for(B, S)

    def probs(params: Any) -> jax.Array:
        return param.bind(built, params)(jnp.asarray(X), context, jnp.zeros(E)).probs_BSE

    still = jax.tree.map(jnp.zeros_like, params)
    along_weights = still | {"w_router": params["w_router"], "bias": params["bias"]}
    right = -jax.jvp(probs, (params,), (along_weights,))[1]
    dtau_draw = jax.nn.sigmoid(params["raw_temperature"])  # the derivative of softplus
    left = 0.7 * jax.jvp(probs, (params,), (still | {"raw_temperature": 1 / dtau_draw},))[1]
    assert float(jnp.abs(left).max()) > 0.1
    if activation in HOMOGENEOUS:
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)
    else:
        assert float(jnp.abs(left - right).max()) > 0.02


@pytest.mark.parametrize(("activation", "width"), [("tanh", 2.0), ("sigmoid", 1.0)])
def test_a_bounded_activation_bounds_the_largest_probability(activation: Any, width: float) -> None:
    no_bias = np.zeros(E, np.float32)
    for tau in (1.0, 0.2):
        bound = np.exp(width / tau) / (np.exp(width / tau) + E - 1)
        wild = route(gate(w=50 * W, bias=no_bias, activation=activation, temperature=constant(tau)))
        assert float(wild.probs_BSE.max()) <= bound * (1 + 1e-5)
        far = np.array([[1e3] + [-1e3] * (E - 1)], np.float32)  # one expert at the top, all others at the bottom
        reached = route(gate(w=far, bias=no_bias, activation=activation, temperature=constant(tau)), np.ones((1, 1, 1)))
        np.testing.assert_allclose(reached.probs_BSE.max(), bound, rtol=1e-5)


@pytest.mark.parametrize("start", [0.01, 1.0, 30.0, 1000.0])
def test_a_learned_temperature_starts_where_it_is_told(start: float) -> None:
    learned = route(gate(learned=True, temperature=constant(start)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        learned,
        route(gate(temperature=constant(start))),
    )


def test_a_scheduled_temperature_follows_the_step() -> None:
    scheduled = gate(temperature=TemperatureConfig(start=2.0, end=0.5, decay_steps=100))
    for step, tau in ((0, 2.0), (50, 1.0), (100, 0.5), (999, 0.5)):
        fixed = route(gate(temperature=constant(tau)))
        np.testing.assert_allclose(route(scheduled, step=step).probs_BSE, fixed.probs_BSE, rtol=1e-5)


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature.end = 0.3: a learned temperature ignores the schedule"):
        check(ActivationGateConfig(learned=True, temperature=TemperatureConfig(start=1.0, end=0.3)))
    with pytest.raises(ConfigError, match=r"normalise = 'sum': must be 'none' when num_selected is 1"):
        check(ActivationGateConfig(num_selected=1, normalise="sum"))
    with pytest.raises(ConfigError, match=r"num_selected = 0: must be at least 1"):
        check(ActivationGateConfig(num_selected=0))
