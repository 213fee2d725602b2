"""Dense-to-sparse routing against numpy, at the noise that was drawn.

Guards against: the released code's default that is hard from step 0 on, and its Gumbel noise in evaluation.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.balance.statistics import statistics
from moe.config import ConfigError, check
from moe.dispatch import DenseConfig, ExpertWeights
from moe.layers.moe import MoEConfig
from moe.routing import noise
from moe.routing.base import Context, RouterConfig, Routing
from moe.routing.dense_to_sparse import DenseToSparseConfig
from moe.routing.temperature import TemperatureConfig
from tests.routing.contexts import context_for


def constant(tau: float) -> TemperatureConfig:
    return TemperatureConfig(start=tau, end=tau)


EXAMPLES: list[RouterConfig] = [
    DenseToSparseConfig(),
    DenseToSparseConfig(temperature=constant(0.4)),
    DenseToSparseConfig(temperature=constant(0.4), weights="clean"),
    DenseToSparseConfig(temperature=TemperatureConfig(decay_steps=10, shape="linear"), switch_step=3),
    DenseToSparseConfig(temperature=TemperatureConfig(decay_steps=10), threshold=0.05, switch_step=1000),
]
B, S, E = 2, 40, 8
LOGITS = np.random.default_rng(0).normal(0, 1.5, (B, S, E)).astype(np.float32)


def context(train: bool = True, step: int = 5, padding: int = 0) -> Context:
    return dataclasses.replace(context_for(B, S, padding=padding, train=train), step=jnp.int32(step))


def route(at: Context | None = None, **fields: Any) -> Routing:
    """Routing of LOGITS: x = the logits, w_router = 1."""
    router = param.bind(DenseToSparseConfig(**fields).build(jax.random.key(0), E, E), {"w_router": jnp.eye(E)})
    return router(jnp.asarray(LOGITS), at or context(), jnp.zeros(E))


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def noisy_logits() -> np.ndarray:
    return LOGITS.astype(np.float64) + np.asarray(noise.gumbel(context(), E), np.float64)


def active(routing: Routing) -> np.ndarray:
    """bool [B, S, E]."""
    return (np.asarray(routing.expert_BR) < E).reshape(B, S, E)


@pytest.mark.parametrize("weights", ["noisy", "clean"])
@pytest.mark.parametrize("tau", [0.2, 0.4, 1.0])
def test_active_experts_weights_margins_and_counts_equal_numpy(tau: float, weights: Any) -> None:
    at = context(padding=7)
    found = route(at, temperature=constant(tau), weights=weights)
    g = softmax(noisy_logits() / tau)
    used = g if weights == "noisy" else softmax(LOGITS)
    real = np.asarray(at.mask_BS)[..., None]
    expected = (g > 1e-3) & real
    assert expected.sum() < (E * real).sum() or tau == 1.0, "no expert is inactive: the case shows nothing"
    np.testing.assert_array_equal(active(found), expected)
    np.testing.assert_allclose(found.weight_BR.reshape(B, S, E), expected * used, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.probs_BSE, used * real, rtol=1e-4, atol=1e-7)
    left_out = np.where(g > 1e-3, -np.inf, g).max(axis=-1)
    margin = np.where(g > 1e-3, g, np.inf).min(axis=-1) - left_out
    np.testing.assert_allclose(found.margin_BS, np.where(real[..., 0], margin, np.inf), rtol=1e-2, atol=1e-7)
    sums = statistics(found, at.mask_BS, jnp.zeros((B,), jnp.int32))
    np.testing.assert_array_equal(sums.count_BE, expected.sum(axis=1))


def test_at_a_low_temperature_the_scores_are_the_one_hot_of_the_noisy_maximum() -> None:
    found = route(temperature=constant(1e-4))
    best = np.eye(E)[noisy_logits().argmax(axis=-1)]
    np.testing.assert_allclose(found.weight_BR.reshape(B, S, E), best, atol=1e-3)
    np.testing.assert_array_equal(active(found), best > 0)


def test_at_a_high_temperature_all_experts_are_active_and_equal() -> None:
    found = route(temperature=constant(1e6))
    assert active(found).all() and np.isinf(found.margin_BS).all()
    np.testing.assert_allclose(found.weight_BR, np.full((B, S * E), 1 / E), rtol=1e-4)


@pytest.mark.parametrize("shape", ["exp", "linear"])
def test_for_fixed_noise_the_active_sets_only_shrink(shape: Any) -> None:
    schedule = TemperatureConfig(start=4.0, end=0.05, decay_steps=40, shape=shape)
    sets = [active(route(context(step=step), temperature=schedule)) for step in range(0, 41, 4)]
    for before, after in itertools.pairwise(sets):
        assert (after <= before).all(), "an expert came back"
    assert sets[0].mean() > 0.9 and (sets[-1].sum(axis=-1) >= 1).all() and sets[-1].mean() < 0.25


def test_one_expert_alone_from_the_switch_step_on_and_never_by_default() -> None:
    fields: dict[str, Any] = {"temperature": constant(1.0), "switch_step": 10}
    assert active(route(context(step=9), **fields)).mean() > 0.5
    after = route(context(step=10), **fields)
    best = np.eye(E)[noisy_logits().argmax(axis=-1)]
    np.testing.assert_array_equal(active(after), best > 0)
    np.testing.assert_allclose(after.weight_BR.reshape(B, S, E), best * softmax(noisy_logits()), rtol=1e-4)
    for step in (0, 10**6):
        assert active(route(context(step=step), temperature=constant(1.0))).mean() > 0.5
    with pytest.raises(ConfigError, match=r"switch_step = -1: must be at least 0, or None"):
        check(DenseToSparseConfig(switch_step=-1))


@pytest.mark.parametrize(("weights", "tau"), [("noisy", 0.5), ("clean", 1.0)])
def test_evaluation_takes_the_best_expert_alone_without_noise(weights: Any, tau: float) -> None:
    found = route(context(train=False), temperature=constant(0.5), weights=weights)
    best = np.eye(E)[LOGITS.argmax(axis=-1)]
    np.testing.assert_array_equal(active(found), best > 0)
    np.testing.assert_allclose(found.weight_BR.reshape(B, S, E), best * softmax(LOGITS / tau), rtol=1e-4)
    other_key = dataclasses.replace(context(train=False), key=jax.random.key(77))
    again = route(other_key, temperature=constant(0.5), weights=weights)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_identical_experts_give_one_expert_times_the_sum_of_the_weights() -> None:
    D, F = E, 6
    keys = jax.random.split(jax.random.key(4), 3)
    one = [0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, ((D, F), (D, F), (F, D)), strict=True)]
    same = ExpertWeights(*(jnp.broadcast_to(w, (E, *w.shape)) for w in one))
    x = jnp.asarray(LOGITS)
    routing = route(temperature=constant(0.4), weights="clean")
    y, _ = DenseConfig().build()(x, routing, same)
    expert = (jax.nn.silu(x @ one[0]) * (x @ one[1])) @ one[2]
    total = routing.weight_BR.reshape(B, S, E).sum(axis=-1, keepdims=True)
    assert float(total.min()) < 0.9, "the weights must not be renormalised"
    np.testing.assert_allclose(y, total * expert, rtol=1e-4, atol=1e-5)


def test_more_experts_than_the_threshold_allows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router.threshold = 0.001: must be less than 1 / num_experts = 0.001"):
        check(MoEConfig(num_experts=1000, router=DenseToSparseConfig()))
    check(MoEConfig(num_experts=999, router=DenseToSparseConfig()))
    with pytest.raises(ConfigError, match=r"temperature.end = 0: must be greater than 0"):
        check(DenseToSparseConfig(temperature=TemperatureConfig(end=0)))
    with pytest.raises(ConfigError, match=r"threshold = 1.0: must be at least 0 and less than 1"):
        check(DenseToSparseConfig(threshold=1.0))
