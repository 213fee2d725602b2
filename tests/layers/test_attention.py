"""Attention against a loop over sequences, heads and positions."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import axes, param
from moe.config import ConfigError, check
from moe.layers.attention import Attention, AttentionConfig
from moe.layers.rope import RopeConfig, YarnConfig
from moe.routing.base import Context
from tests.layers.sublayers import build, check_contract, cuts

B, S, D = 2, 9, 12
CONFIG = AttentionConfig(num_heads=4, num_kv_heads=2, head_width=6, rope_theta=100.0)
SEGMENT = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)
POSITION = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4, 0, 1, 2]], np.int32)
ONE_DOCUMENT = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
NO_BIAS = jnp.zeros(0)


def attention(config: AttentionConfig = CONFIG) -> Attention:
    return Attention(config, jax.random.key(0), D, 0.6, 0.6)


def run(module: Attention, x: np.ndarray, position: np.ndarray = POSITION, segment: np.ndarray = SEGMENT) -> jax.Array:
    return _run(*nnx.split(module), x, position, segment)


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, x: jax.Array, position: jax.Array, segment: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(x, context(position, segment), jnp.zeros(0))[0]


def context(position: Any, segment: Any) -> Context:
    zeros = jnp.zeros(position.shape, jnp.int32)
    return Context(
        token_BS=zeros, segment_BS=jnp.asarray(segment), position_BS=jnp.asarray(position), task_BS=zeros,
        sequence_B=zeros[:, 0], step=jnp.int32(0), key=jax.random.key(0),
    )  # fmt: skip


def inputs(seed: int = 0, shape: tuple[int, ...] = (B, S, D)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def turned(x_H: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotary by complex numbers: dimension i is the real and i + H/2 the imaginary part."""
    half = len(x_H) // 2
    angle = position * theta ** (-np.arange(half) / half)
    pair = (x_H[:half] + 1j * x_H[half:]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag])


def by_loop(module: Attention, x: np.ndarray, position: np.ndarray, segment: np.ndarray) -> np.ndarray:
    config, w = module.config, {name: np.asarray(v, np.float64) for name, v in param.pure(module).items()}
    N, M, H = config.num_heads, config.num_kv_heads, config.head_width
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        for n in range(N):
            m = n // (N // M)  # neighbouring query heads share a key-value head
            query, key, value = x[b] @ w["w_query"][:, n], x[b] @ w["w_key"][:, m], x[b] @ w["w_value"][:, m]
            for s in range(x.shape[1]):
                seen = [t for t in range(s + 1) if segment[b, t] == segment[b, s]]
                q = turned(query[s], position[b, s], config.rope_theta)
                scores = np.array([q @ turned(key[t], position[b, t], config.rope_theta) for t in seen]) / np.sqrt(H)
                share = np.exp(scores - scores.max())
                out[b, s] += (share / share.sum()) @ value[seen] @ w["w_out"][n]
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_it_equals_a_loop_over_heads_and_positions(num_kv_heads: int) -> None:
    module = attention(dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads))
    x = inputs()
    found = run(module, x)
    np.testing.assert_allclose(found, by_loop(module, x, POSITION, SEGMENT), rtol=1e-4, atol=1e-5)


def test_a_query_head_reads_the_key_value_head_of_its_group() -> None:
    # Only key-value head 1 holds a value, so heads 0 and 1 (group 0) put out nothing.
    module = attention()
    params = param.pure(module)
    value = params["w_value"].at[:, 0].set(0.0)
    for head, silent in ((0, True), (1, True), (2, False), (3, False)):
        only = jnp.zeros_like(params["w_out"]).at[head].set(params["w_out"][head])
        y = run(param.bind(module, params | {"w_value": value, "w_out": only}), inputs())
        assert bool((y == 0).all()) == silent, head


def test_no_token_sees_another_document_or_a_later_token() -> None:
    module, x = attention(), inputs()
    before = np.asarray(run(module, x))
    for b in range(B):
        for t in range(S):
            other = x.copy()
            other[b, t] += 1.0
            after = np.asarray(run(module, other))
            moved = (after != before).any(axis=-1)
            expected = np.zeros((B, S), bool)
            expected[b] = (SEGMENT[b] == SEGMENT[b, t]) & (np.arange(S) >= t)
            np.testing.assert_array_equal(moved, expected, err_msg=f"sequence {b}, token {t}")


def test_padding_is_finite_in_value_and_gradient() -> None:
    module, x, empty = attention(), jnp.asarray(inputs()), np.zeros((B, S), np.int32)
    grad = jax.grad(lambda x: run(module, x, segment=empty).sum())(x)
    assert bool(jnp.isfinite(run(module, x, segment=empty)).all() and jnp.isfinite(grad).all())


def test_norms_over_whole_queries_and_keys_see_all_heads_at_once() -> None:
    """By numpy: rms over N H and M H dimensions, a gain for each of them; values are left alone."""
    x = inputs()
    module = attention(dataclasses.replace(CONFIG, head_norm="qk_whole", norm_eps=1e-2))
    params = param.pure(module)
    assert {name for name in params if name.endswith("_norm")} == {"query_norm", "key_norm"}
    gain = {"query": np.linspace(0.5, 2.0, 24), "key": np.linspace(0.5, 2.0, 12)}
    scales = {f"{name}_norm": {"scale": jnp.asarray(g, jnp.float32)} for name, g in gain.items()}
    found = param.bind(module, params | scales)._project(jnp.asarray(x), jnp.zeros((B, S), jnp.int32))
    for part, name in zip(found, ("query", "key", "value"), strict=True):
        raw = np.einsum("bsd,dnh->bsnh", x, params[f"w_{name}"])
        if name != "value":
            flat = raw.reshape(B, S, -1)
            raw = (flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-2) * gain[name]).reshape(raw.shape)
        np.testing.assert_allclose(part, raw, rtol=1e-4, atol=1e-5)


def test_biases_are_added_to_queries_keys_and_values_and_start_at_zero() -> None:
    x = inputs()
    plain, module = attention(), attention(dataclasses.replace(CONFIG, qkv_bias=True))
    np.testing.assert_array_equal(run(module, x), run(plain, x))
    params = param.pure(module)
    bias = {f"b_{name}": jnp.arange(float(n * 6)).reshape(-1) for name, n in (("query", 4), ("key", 2), ("value", 2))}
    assert {name: leaf.shape for name, leaf in bias.items()} == {
        name: leaf.shape for name, leaf in params.items() if name.startswith("b_")
    }
    found = param.bind(module, params | bias)._project(jnp.asarray(x), jnp.zeros((B, S), jnp.int32))
    for part, name in zip(found, ("query", "key", "value"), strict=True):
        raw = np.einsum("bsd,dnh->bsnh", x, params[f"w_{name}"]) + np.reshape(bias[f"b_{name}"], (-1, 6))
        np.testing.assert_allclose(part, raw, rtol=1e-4, atol=1e-5)


def test_norms_over_whole_queries_and_biases_can_be_cut_over_heads() -> None:
    heads = AttentionConfig(num_heads=4, num_kv_heads=4, head_width=4, head_norm="qk_whole", rope=YarnConfig(width=2))
    check_contract(heads)
    found = cuts(build(dataclasses.replace(heads, qkv_bias=True, head_norm="none")))
    spec = jax.sharding.PartitionSpec
    assert found["b_query"] == found["b_key"] == found["b_value"] == spec(axes.TENSOR)
    # A bias of the keys alone moves all scores of a query alike, so without rotation its gradient is zero.
    check_contract(AttentionConfig(num_heads=4, num_kv_heads=2, head_width=4, qkv_bias=True))


def test_yarn_scales_the_scores_of_whole_heads() -> None:
    yarn, x = YarnConfig(factor=8.0, original_length=16, fast=2.0), inputs()
    module = attention(dataclasses.replace(CONFIG, rope=yarn))
    query, key, value = (
        np.asarray(part, np.float64) for part in module._project(jnp.asarray(x), jnp.asarray(POSITION))
    )
    scores = np.einsum("bsmgh,btmh->bmgst", query.reshape(B, S, 2, 2, 6), key) / np.sqrt(6)
    scores = scores * (0.1 * np.log(8.0) + 1) ** 2
    mask = np.tril(np.ones((S, S), bool)) & (SEGMENT[:, :, None] == SEGMENT[:, None, :])
    share = np.where(mask[:, None, None], np.exp(scores), 0)
    mixed = np.einsum("bmgst,btmh->bsmgh", share / share.sum(-1, keepdims=True), value).reshape(B, S, 4, 6)
    expected = np.einsum("bsnh,nhd->bsd", mixed, param.pure(module)["w_out"])
    np.testing.assert_allclose(run(module, x), expected, rtol=1e-4, atol=1e-5)


def test_head_norms_act_per_head_before_rotation_and_share_a_gain() -> None:
    """By numpy on the projections: rms 1 times the gain per head, whatever the head's size."""
    x = inputs()
    for head_norm, normed in (("none", ""), ("qk", "qk"), ("qkv", "qkv")):
        module = attention(dataclasses.replace(CONFIG, head_norm=head_norm))  # type: ignore[arg-type]
        params = param.pure(module)
        gain = {name: jnp.linspace(0.5, 2.0, 6) for name in params if name.endswith("_norm")}
        assert {name[0] for name in gain} == set(normed)
        module = param.bind(module, params | {name: {"scale": scale} for name, scale in gain.items()})
        found = module._project(jnp.asarray(x), jnp.zeros((B, S), jnp.int32))  # position 0 rotates nothing
        for part, name in zip(found, ("query", "key", "value"), strict=True):
            raw = np.einsum("bsd,dnh->bsnh", x, params[f"w_{name}"])
            if name[0] in normed:
                raw = raw / np.sqrt((raw**2).mean(-1, keepdims=True)) * np.linspace(0.5, 2.0, 6)
            np.testing.assert_allclose(part, raw, rtol=1e-4, atol=1e-5)
        turned_query = np.asarray(module._project(jnp.asarray(x), jnp.asarray(POSITION))[0])
        np.testing.assert_allclose((turned_query**2).sum(-1), (np.asarray(found[0]) ** 2).sum(-1), rtol=1e-4)


def test_with_all_heads_normalised_the_size_of_the_input_does_not_matter() -> None:
    x = inputs()
    module = attention(dataclasses.replace(CONFIG, head_norm="qkv"))
    np.testing.assert_allclose(run(module, 50.0 * x), run(module, x), rtol=1e-3, atol=1e-5)
    plain = attention(dataclasses.replace(CONFIG, head_norm="qk"))
    np.testing.assert_allclose(run(plain, 50.0 * x), 50.0 * run(plain, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head_norm", ["qk_whole", "qkv"])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 1, 3), (2, 7)])
def test_decoding_in_pieces_equals_the_whole(pieces: tuple[int, ...], head_norm: Any) -> None:
    module, x = attention(dataclasses.replace(CONFIG, head_norm=head_norm)), jnp.asarray(inputs())
    whole = run(module, x, ONE_DOCUMENT, np.ones((B, S), np.int32))
    cache, first, found = module.empty_cache(B, S + 2, jnp.float32), 0, []  # room for more than there is
    for size in pieces:
        here = slice(first, first + size)
        y, cache = module.decode(x[:, here], context(ONE_DOCUMENT[:, here], ONE_DOCUMENT[:, here]), NO_BIAS, cache)
        found.append(y)
        first += size
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=1e-5, atol=1e-5)
    assert int(cache.length) == S


def test_the_dtype_is_kept() -> None:
    module, x = attention(), jnp.asarray(inputs())
    low = run(module, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    high = run(module, x)
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.05 * float(jnp.abs(high).max()))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AttentionConfig(num_heads=4, num_kv_heads=3), "num_kv_heads = 3: must divide num_heads = 4"),
        (AttentionConfig(head_width=5), "head_width = 5: must be even"),
        (AttentionConfig(rope_theta=0.0), "rope_theta = 0.0: must be greater than 0"),
        (
            AttentionConfig(rope_theta=1.0, rope=YarnConfig()),
            "rope_theta = 1.0: must be greater than 1: YaRN needs frequencies that fall",
        ),
        (AttentionConfig(num_heads=0), "num_heads = 0: must be at least 1"),
        (AttentionConfig(norm_eps=1e-5), "norm_eps = 1e-05: is ignored, as no head is normalised; leave it at 1e-6"),
        (AttentionConfig(head_norm="qk", norm_eps=0.0), "norm_eps = 0.0: must be greater than 0"),
        (
            AttentionConfig(head_width=8, rope=RopeConfig(width=8)),
            "rope.width = 8: must be less than the head's 8 dimensions; 0 turns them all",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: AttentionConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(config)
