"""Pre-gating: equals a loop over tokens, reads its own document only, and decodes as it reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.routing.base import RouterConfig
from moe.routing.pregate import PreGate, PreGateConfig
from tests.routing.contexts import context_for

EXAMPLES: list[RouterConfig] = [
    PreGateConfig(hidden=8, num_heads=2, init_std=0.3),
    PreGateConfig(num_selected=1, hidden=8, num_heads=1, init_std=0.3),
    PreGateConfig(num_selected=3, normalise="sum", hidden=8, num_heads=2, init_std=0.3),
]
B, S, D, E = 2, 10, 6, 8
CONFIG = PreGateConfig(hidden=8, num_heads=2, init_std=0.5)


def router() -> PreGate:
    return CONFIG.build(jax.random.key(0), D, E)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def probabilities(x_SD: np.ndarray, segment_S: np.ndarray) -> np.ndarray:
    """[S, E] of one sequence, token by token and head by head."""
    w = jax.tree.map(np.asarray, param.pure(router()))
    hidden = x_SD @ w["w_in"]
    query, key, value = (norm(hidden) @ w["w_qkv"][part] for part in range(3))
    width = CONFIG.hidden // CONFIG.num_heads
    mixed = np.zeros_like(hidden)
    for t in range(len(x_SD)):
        seen = [s for s in range(t + 1) if segment_S[s] == segment_S[t]]
        for head in range(CONFIG.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = np.array([query[t, part] @ key[s, part] for s in seen]) / np.sqrt(width)
            share = np.exp(scores - scores.max())
            mixed[t, part] = share / share.sum() @ value[seen][:, part]
    hidden = hidden + mixed @ w["w_out"]
    hidden = hidden + np.square(np.maximum(norm(hidden) @ w["w_up"], 0)) @ w["w_down"]
    logits = norm(hidden) @ w["w_router"]
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def test_probabilities_equal_a_loop_over_tokens_and_heads() -> None:
    context = context_for(B, S)
    found = router()(jnp.asarray(tokens()), context, jnp.zeros(E))
    for b in range(B):
        expected = probabilities(tokens()[b], np.asarray(context.segment_BS[b]))
        np.testing.assert_allclose(found.probs_BSE[b], expected, atol=1e-5)
        best = np.argsort(-expected, axis=-1)[:, :2]
        np.testing.assert_array_equal(found.expert_BR[b].reshape(S, 2), best)
        np.testing.assert_allclose(
            found.weight_BR[b].reshape(S, 2), np.take_along_axis(expected, best, axis=-1), atol=1e-5
        )


def test_earlier_tokens_of_the_document_matter_and_other_documents_do_not() -> None:
    route, context = router(), context_for(B, S)  # documents 0..4 and 5..9
    before = route(jnp.asarray(tokens()), context, jnp.zeros(E)).probs_BSE
    changed = tokens()
    changed[:, 2] += 1.0
    after = route(jnp.asarray(changed), context, jnp.zeros(E)).probs_BSE
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 3:5] - after[:, 3:5]).max() > 1e-3
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_decoding_routes_as_reading_the_whole_does(cut: int) -> None:
    route = router()
    context = context_for(B, S)
    whole = jnp.ones_like(context.segment_BS)

    def part(now: slice) -> object:
        return jax.tree.map(lambda leaf: leaf[:, now] if leaf.ndim == 2 else leaf, context)

    context = dataclasses.replace(context, segment_BS=whole)
    expected = route(jnp.asarray(tokens()), context, jnp.zeros(E))
    cache = route.empty_cache(B, S)
    first, cache = route.decode(jnp.asarray(tokens())[:, :cut], part(slice(0, cut)), jnp.zeros(E), cache)
    rest, cache = route.decode(jnp.asarray(tokens())[:, cut:], part(slice(cut, S)), jnp.zeros(E), cache)
    assert int(cache.length) == S
    np.testing.assert_allclose(np.concatenate([first.probs_BSE, rest.probs_BSE], axis=1), expected.probs_BSE, atol=1e-6)


def test_a_config_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden = 10: must be divisible by num_heads = 4"):
        check(PreGateConfig(hidden=10))
    with pytest.raises(ConfigError, match="normalise = 'sum': must be 'none' when num_selected is 1"):
        check(PreGateConfig(num_selected=1, normalise="sum"))
