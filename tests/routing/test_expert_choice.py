"""Expert choice against a loop over experts.

Guards against: capacity rounded away from the formula, padding that fills an expert's buffer, groups that follow the
batch (so that the mesh decides who competes).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.balance.statistics import statistics
from moe.config import ConfigError, check
from moe.layers.moe import MoEConfig
from moe.routing.base import RouterConfig, Routing
from moe.routing.expert_choice import ExpertChoiceConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    ExpertChoiceConfig(),
    ExpertChoiceConfig(capacity_factor=1.0),
    ExpertChoiceConfig(capacity_factor=5.5, init_std=0.05),
]
B, S, E = 3, 12, 4


def route(logits_BSE: np.ndarray, capacity_factor: float, padding: int = 0, bias: float = 0.0) -> Routing:
    """Routing of exactly these logits: x = the logits, w_router = 1."""
    B, S, E = logits_BSE.shape
    router = ExpertChoiceConfig(capacity_factor=capacity_factor).build(jax.random.key(0), E, E)
    router = param.bind(router, {"w_router": jnp.eye(E)})
    return router(jnp.asarray(logits_BSE), context_for(B, S, padding=padding), bias * jnp.arange(E, dtype=jnp.float32))


def logits(seed: int = 0, S: int = S) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (B, S, E)).astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def taken(routing: Routing) -> np.ndarray:
    """[B, S, E] how often an expert took a token."""
    out = np.zeros((*routing.probs_BSE.shape[:2], routing.num_experts + 1), int)
    for b in range(out.shape[0]):
        np.add.at(out[b], (np.asarray(routing.token_BR[b]), np.asarray(routing.expert_BR[b])), 1)
    return out[..., :-1]


@pytest.mark.parametrize("padding", [0, 3, 9])
@pytest.mark.parametrize("capacity_factor", [0.3, 1.0, 1.1, 2.5, 4.0])
def test_choices_weights_and_margins_equal_a_loop_over_experts(capacity_factor: float, padding: int) -> None:
    z = logits()
    found, p, real = route(z, capacity_factor, padding), softmax(z.astype(np.float64)), S - padding
    C = math.ceil(round(capacity_factor * S / E, 6))
    expected, margin = np.zeros((B, S, E), int), np.full((B, S), np.inf)
    for b in range(B):
        for e in range(E):
            order = sorted(range(real), key=lambda s: -p[b, s, e])
            expected[b, order[:C], e] = 1
            if real > C:
                last_in, first_out = p[b, order[C - 1], e], p[b, order[C], e]
                for rank, s in enumerate(order):
                    move = p[b, s, e] - first_out if rank < C else last_in - p[b, s, e]
                    margin[b, s] = min(margin[b, s], move)
    np.testing.assert_array_equal(taken(found), expected)
    assert found.token_BR.shape == (B, E * C)
    np.testing.assert_allclose(found.margin_BS, margin, rtol=1e-3, atol=1e-6)
    for b in range(B):
        for token, expert, weight in zip(found.token_BR[b], found.expert_BR[b], found.weight_BR[b], strict=True):
            np.testing.assert_allclose(weight, p[b, token, expert] if expert < E else 0.0, rtol=1e-5)


@pytest.mark.parametrize("capacity_factor", [0.3, 1.0, 2.0, 4.0])
def test_every_expert_takes_exactly_its_capacity(capacity_factor: float) -> None:
    found = route(logits(), capacity_factor)
    C = math.ceil(capacity_factor * S / E)
    sums = statistics(found, context_for(B, S).mask_BS, jnp.zeros((B,), jnp.int32))
    np.testing.assert_array_equal(sums.count_BE, np.full((B, E), C))
    assert taken(found).max() == 1, "an expert took a token twice"


def test_with_fewer_real_tokens_than_the_capacity_the_rest_is_void() -> None:
    found = route(logits(), 2.0, padding=10)  # C = 6, 2 real tokens
    np.testing.assert_array_equal(taken(found).sum(axis=1), np.full((B, E), 2))
    assert (found.expert_BR == E).sum() == B * E * 4 and not np.asarray(found.weight_BR)[found.expert_BR == E].any()
    nothing = route(logits(), 2.0, padding=S)
    assert (nothing.expert_BR == E).all() and not nothing.weight_BR.any() and np.isinf(nothing.margin_BS).all()


def test_a_token_is_taken_by_any_number_of_experts() -> None:
    # C = ceil(1.0 * 3 / 4) = 1. Expert 0 prefers token 1; token 2 is peaked there too and loses; token 0 gets the rest.
    z = np.array([[[0, 0, 0, 0], [9, 0, 0, 0], [8, 0, 0, 0]]], np.float32)
    np.testing.assert_array_equal(taken(route(z, 1.0)).sum(axis=-1), [[3, 1, 0]])
    np.testing.assert_array_equal(taken(route(z, 4.0)).sum(axis=-1), [[4, 4, 4]])


def test_of_equal_scores_the_earlier_token_wins_and_the_margin_is_zero() -> None:
    found = route(np.zeros((1, 8, 4), np.float32), 1.0)
    np.testing.assert_array_equal(taken(found)[0, :, 0], [1, 1, 0, 0, 0, 0, 0, 0])
    assert not found.margin_BS.any()


def test_a_later_token_pushes_out_an_earlier_one_so_it_says_it_is_not_causal() -> None:
    config = ExpertChoiceConfig()
    assert not config.causal and not config.padding_invariant
    z = logits()
    later = z.copy()
    later[:, 7:] += np.array([5, -5, 5, -5], np.float32)
    a, b = taken(route(z, 1.0)), taken(route(later, 1.0))
    assert (a[:, :7] != b[:, :7]).any()


def test_sequences_do_not_compete_with_each_other() -> None:
    z = logits()
    together = route(z, 1.0)
    for b in range(B):
        alone = route(z[b : b + 1], 1.0)
        np.testing.assert_array_equal(together.token_BR[b], alone.token_BR[0])
        np.testing.assert_array_equal(together.weight_BR[b], alone.weight_BR[0])


def test_an_expert_bias_changes_nothing() -> None:
    jax.tree.map(np.testing.assert_array_equal, route(logits(), 1.0, bias=3.0), route(logits(), 1.0))


def test_capacities_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"capacity_factor = 0.0: must be greater than 0"):
        check(ExpertChoiceConfig(capacity_factor=0.0))
    config = MoEConfig(num_experts=4, router=ExpertChoiceConfig(capacity_factor=5.0))
    with pytest.raises(ConfigError, match=r"router.capacity_factor = 5.0: must be at most num_experts = 4"):
        check(config)
    assert "num_selected" not in {field.name for field in dataclasses.fields(ExpertChoiceConfig)}
