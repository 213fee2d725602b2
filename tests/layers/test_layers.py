"""Norm, MLP and attention against numpy, and decoding against the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.layers.attention import Attention, AttentionConfig, Cache, rotate
from moe.layers.mlp import MLP
from moe.layers.norm import RMSNorm

B, S, D = 2, 9, 12
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 2, 2, 0, 0, 0, 0]], jnp.int32)
POSITIONS = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1, 0, 0, 0, 0]], jnp.int32)


def test_rms_norm_by_hand() -> None:
    norm = param.bind(RMSNorm(4, eps=0.0), {"scale": jnp.array([1.0, 1.0, 2.0, 0.5])})
    # mean(x^2) = (1 + 1 + 4 + 4) / 4 = 2.5
    np.testing.assert_allclose(
        norm(jnp.array([1.0, -1.0, 2.0, -2.0])), np.array([1, -1, 4, -1]) / np.sqrt(2.5), rtol=1e-6
    )
    assert not np.asarray(RMSNorm(4)(jnp.zeros(4))).any()
    assert RMSNorm(4)(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rms_norm_does_not_overflow_in_bfloat16() -> None:
    found = RMSNorm(256)(jnp.full((256,), 300.0, jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(found, np.float32), 1.0, rtol=1e-2)


def test_the_gated_mlp_equals_numpy() -> None:
    mlp = MLP(jax.random.key(0), 5, 7, 0.5, 0.5)
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, 4, 5)))
    gate, up, down = (np.asarray(w[...]) for w in (mlp.w_gate, mlp.w_up, mlp.w_down))
    h = x @ gate
    np.testing.assert_allclose(mlp(jnp.asarray(x)), (h / (1 + np.exp(-h)) * (x @ up)) @ down, atol=1e-6)


def make(heads: int = 4, kv_heads: int = 2, width: int = 6) -> Attention:
    config = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_width=width, rope_theta=100.0)
    return Attention(config, jax.random.key(0), D, 0.4, 0.4)


def rotate_numpy(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Pairs (i, i + H/2) as complex numbers, turned by position * theta^(-2i/H)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def attention_numpy(layer: Attention, x: np.ndarray, position: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """One sequence, one head and one query at a time."""
    wq, wk, wv, wo = (np.asarray(w[...], np.float64) for w in (layer.w_query, layer.w_key, layer.w_value, layer.w_out))
    N, M, H = layer.config.num_heads, layer.config.num_kv_heads, layer.config.head_width
    out = np.zeros(x.shape)
    for n in range(N):
        m = n // (N // M)
        for t in range(len(x)):
            query = rotate_numpy(x[t] @ wq[:, n], position[t], layer.config.rope_theta)
            seen = [s for s in range(t + 1) if segment[s] == segment[t]]
            keys = [rotate_numpy(x[s] @ wk[:, m], position[s], layer.config.rope_theta) for s in seen]
            score = np.exp([query @ key / np.sqrt(H) for key in keys])
            out[t] += sum(a * (x[s] @ wv[:, m]) for a, s in zip(score / score.sum(), seen, strict=True)) @ wo[n]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_equals_a_loop_over_heads_and_queries(heads: int, kv_heads: int) -> None:
    layer = make(heads, kv_heads)
    x = np.asarray(jax.random.normal(jax.random.key(1), (B, S, D)))
    found = layer(jnp.asarray(x), POSITIONS, SEGMENTS)
    for b in range(B):
        np.testing.assert_allclose(found[b], attention_numpy(layer, x[b], POSITIONS[b], SEGMENTS[b]), atol=1e-5)


def test_a_document_sees_neither_another_document_nor_its_own_future() -> None:
    layer, x = make(), jax.random.normal(jax.random.key(1), (B, S, D))
    jacobian = jax.jacobian(lambda x: layer(x, POSITIONS, SEGMENTS)[0])(x)[:, :, 0]  # [S, D, S, D]
    depends = np.abs(np.asarray(jacobian)).max(axis=(1, 3)) > 0
    segment = np.asarray(SEGMENTS[0])
    np.testing.assert_array_equal(depends, np.tril(segment[:, None] == segment[None, :]))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(a: int, b: int) -> float:
        return float((rotate(q, jnp.array([[a]]), 100.0) * rotate(k, jnp.array([[b]]), 100.0)).sum())

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), 100.0), q)


def test_decoding_token_by_token_equals_the_whole_sequence() -> None:
    layer, x = make(), jax.random.normal(jax.random.key(1), (B, S, D))
    position = jnp.broadcast_to(jnp.arange(S), (B, S))
    expected = layer(x, position, jnp.ones((B, S), jnp.int32))
    empty = jnp.zeros((B, S + 3, layer.config.num_kv_heads, layer.config.head_width))
    cache, found = Cache(empty, empty, jnp.int32(0)), []
    for piece in (slice(0, 4), *(slice(t, t + 1) for t in range(4, S))):  # a prompt, then one by one
        y, cache = layer.decode(x[:, piece], position[:, piece], cache)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-5)
    assert int(cache.length) == S


def test_padding_never_makes_a_nan() -> None:
    layer = make()
    x = jax.random.normal(jax.random.key(1), (1, S, D))
    zeros = jnp.zeros((1, S), jnp.int32)
    value, gradient = jax.value_and_grad(lambda x: layer(x, zeros, zeros).sum())(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_heads_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_kv_heads = 3: must divide num_heads = 4"):
        check(AttentionConfig(num_heads=4, num_kv_heads=3))
    with pytest.raises(ConfigError, match=r"head_width = 7: must be even"):
        check(AttentionConfig(head_width=7))
