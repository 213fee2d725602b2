"""Multi-head latent attention against loops over heads and positions, in numpy."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.layers.latent_attention import LatentAttention, LatentAttentionConfig
from moe.layers.rope import RopeConfig, YarnConfig
from moe.routing.base import Context
from moe.train.run import RunConfig
from tests import grid
from tests.layers.sublayers import build, check_contract, cuts, decoded, one_document, run, value_and_gradient

B, S, D = 2, 7, 16
SIZES = {"num_heads": 4, "query_latent": 12, "key_value_latent": 8, "head_width": 6, "rope_width": 4, "value_width": 10}
CONFIG = LatentAttentionConfig(**SIZES, rope_theta=100.0)  # type: ignore[arg-type]
STRETCHED = dataclasses.replace(CONFIG, rope=YarnConfig(factor=4.0, original_length=64, fast=4.0, interleaved=True))
DIRECT = dataclasses.replace(CONFIG, query_latent=0, rope=RopeConfig())
SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 3, 3]], np.int32)
POSITION = np.array([[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 0, 1]], np.int32)


def inputs(seed: int = 0, batch: int = B, positions: int = S) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, positions, D)).astype(np.float32)


def context(position: np.ndarray = POSITION, segment: np.ndarray = SEGMENT) -> Context:
    zeros = jnp.zeros(position.shape, jnp.int32)
    return Context(
        token_BS=zeros, segment_BS=jnp.asarray(segment), position_BS=jnp.asarray(position), task_BS=zeros,
        sequence_B=zeros[:, 0], step=jnp.int32(0), key=jax.random.key(0),
    )  # fmt: skip


def with_gains(module: LatentAttention) -> LatentAttention:
    """Norms whose gains are not all 1."""
    params = param.pure(module)
    gains = {name: {"scale": jnp.linspace(0.5, 2.0, params[name]["scale"].size)} for name in params if "norm" in name}
    return param.bind(module, params | gains)


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain


def turned(x_R: np.ndarray, position: int, frequencies: np.ndarray, interleaved: bool) -> np.ndarray:
    """By complex numbers: of every pair one is the real and the other the imaginary part."""
    half = len(x_R) // 2
    real, imaginary = (x_R[0::2], x_R[1::2]) if interleaved else (x_R[:half], x_R[half:])
    pair = (real + 1j * imaginary) * np.exp(1j * position * frequencies)
    out = np.zeros_like(x_R)
    if interleaved:
        out[0::2], out[1::2] = pair.real, pair.imag
    else:
        out[:half], out[half:] = pair.real, pair.imag
    return out


def by_loop(module: LatentAttention, x: np.ndarray, frequencies: np.ndarray, factor: float = 1.0) -> np.ndarray:
    config = module.config
    w: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), param.pure(module))
    H, C, out = config.head_width, config.key_value_latent, np.zeros(x.shape)
    turn = functools.partial(turned, frequencies=frequencies, interleaved=config.rope.interleaved)
    for b in range(B):
        hidden = rms(x[b] @ w["w_query_down"], w["query_norm"]["scale"]) if config.query_latent else x[b]
        both = x[b] @ w["w_key_value_down"]
        latent = rms(both[:, :C], w["key_value_norm"]["scale"])
        for n in range(config.num_heads):
            query, key = hidden @ w["w_query_up"][:, n], latent @ w["w_key_up"][:, n]
            value = latent @ w["w_value_up"][:, n]
            for s in range(S):
                seen = [t for t in range(s + 1) if SEGMENT[b, t] == SEGMENT[b, s]]
                scores = np.array([
                    query[s, :H] @ key[t] + turn(query[s, H:], POSITION[b, s]) @ turn(both[t, C:], POSITION[b, t])
                    for t in seen
                ])  # fmt: skip
                share = np.exp(factor * scores / np.sqrt(H + config.rope_width))
                out[b, s] += (share / share.sum()) @ value[seen] @ w["w_out"][n]
    return out


@pytest.mark.parametrize("config", [CONFIG, DIRECT], ids=["two latents", "queries from the input"])
def test_it_equals_a_loop_over_heads_and_positions(config: LatentAttentionConfig) -> None:
    module, x = with_gains(build(config, D)), inputs()
    expected = by_loop(module, x, np.array([1.0, 0.1]))  # 100^-0 and 100^-(1/2)
    np.testing.assert_allclose(run(module, jnp.asarray(x), context()), expected, rtol=1e-4, atol=1e-5)


def test_yarn_slows_the_shared_key_and_scales_the_scores() -> None:
    # 64 positions, W = 4, theta 100. Turns: 64 / 2 pi = 10.19 and 1.019. c(4) = 2 ln(64 / 8 pi) / ln 100 = 0.406 and
    # c(1) = 1.008, so low = 0, high = 2: the first frequency stays, the second goes half way to a quarter of it.
    module, x = with_gains(build(STRETCHED, D)), inputs()
    frequencies, factor = np.array([1.0, 0.1 * (0.5 + 0.5 / 4)]), (0.1 * np.log(4.0) + 1) ** 2
    found = run(module, jnp.asarray(x), context())
    np.testing.assert_allclose(found, by_loop(module, x, frequencies, factor), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, by_loop(module, x, frequencies), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [STRETCHED, DIRECT], ids=["two latents", "queries from the input"])
def test_decoding_in_pieces_equals_the_whole(config: LatentAttentionConfig) -> None:
    module, x = with_gains(build(config, D)), jnp.asarray(inputs())
    whole = run(module, x, one_document(B, S))
    np.testing.assert_allclose(decoded(module, x, (4, 1, 2), S + 2), whole, rtol=1e-4, atol=1e-5)


def test_the_cache_holds_the_latent_and_one_key_for_all_heads() -> None:
    cache = build(CONFIG, D).empty_cache(B, 5, jnp.bfloat16)
    assert [leaf.shape for leaf in cache] == [(B, 5, 8), (B, 5, 4), ()]
    assert cache.latent_BSC.dtype == cache.key_BSR.dtype == jnp.bfloat16


def test_it_keeps_the_contract_of_sublayers() -> None:
    check_contract(CONFIG)
    found, spec = cuts(build(CONFIG)), jax.sharding.PartitionSpec
    embed = axes.TABLE["embed"]
    assert found["w_query_down"] == found["w_key_value_down"] == spec(embed, None)
    assert found["w_query_up"] == found["w_key_up"] == found["w_value_up"] == spec(embed, axes.TENSOR, None)
    assert found["w_out"] == spec(axes.TENSOR, None, embed)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1, tensor=4, fsdp=2), MeshConfig(data=1, context=2, tensor=2, fsdp=2)], ids=str
)
def test_heads_and_positions_can_be_cut(mesh: MeshConfig) -> None:
    config = dataclasses.replace(STRETCHED, query_latent=16)
    module, x = with_gains(build(config, D)), jnp.asarray(inputs(batch=2, positions=8))
    here = one_document(2, 8)
    (_, y), gradients = jax.jit(lambda *a: value_and_gradient(module, *a))(param.pure(module), x, here)
    devices = axes.make_mesh(mesh)
    placed = jax.device_put(param.pure(module), param.shardings(module, devices))
    with jax.set_mesh(devices):
        over = jax.jit(lambda *a: value_and_gradient(module, *a))
        (_, found), found_gradients = over(
            placed, jax.device_put(x, axes.sharding(devices, ("batch", "stream", None))), here
        )
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        assert float(jnp.linalg.norm(np.asarray(a) - np.asarray(b)) / jnp.linalg.norm(b)) < 1e-5


def test_multiply_adds_are_those_of_its_products() -> None:
    down, up = 16 * 12 + 16 * (8 + 4), 12 * 4 * (6 + 4) + 8 * 4 * (6 + 10)
    scores_and_mixing = 4 * (10 + 10) * 20 // 2  # S = 20, half of it behind the mask
    assert CONFIG.multiply_adds(16, 20) == down + up + 4 * 10 * 16 + scores_and_mixing


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dataclasses.replace(CONFIG, rope_width=3), "rope_width = 3: must be even"),
        (dataclasses.replace(CONFIG, key_value_latent=0), "key_value_latent = 0: must be at least 1"),
        (dataclasses.replace(CONFIG, rope=RopeConfig(width=2)), "rope.width = 2: must be 0: rope_width says"),
        (dataclasses.replace(CONFIG, norm_eps=0.0), "norm_eps = 0.0: must be greater than 0"),
        (dataclasses.replace(CONFIG, rope_theta=0.0, rope=RopeConfig()), "rope_theta = 0.0: must be greater than 0"),
        (dataclasses.replace(STRETCHED, rope_theta=1.0), "rope_theta = 1.0: must be greater than 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: LatentAttentionConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        check(config)


@pytest.mark.parametrize("latent", ["query_latent", "key_value_latent"])
def test_a_latent_that_fsdp_and_context_cannot_both_cut_is_refused(latent: str) -> None:
    """12 divides by 4 and by 2, not by their product."""
    sizes = {"query_latent": 16, "key_value_latent": 16} | {latent: 12}
    model = grid.model_config(attention=dataclasses.replace(CONFIG, **sizes))
    config = RunConfig(batch_size=8, model=model, mesh=MeshConfig(data=1, fsdp=4, context=2))
    said = f"model.attention.{latent} = 12: must be divisible by mesh.fsdp * context = 8"
    with pytest.raises(ConfigError, match=re.escape(said)):
        check(config)
    check(dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4)))
    check(dataclasses.replace(config, mesh=MeshConfig(data=1, context=2)))


def test_the_dtype_is_kept() -> None:
    module, x = build(CONFIG, D), jnp.asarray(inputs())
    low = run(module, x.astype(jnp.bfloat16), context())
    assert low.dtype == jnp.bfloat16
    high = run(module, x, context())
    np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.06 * float(jnp.abs(high).max()))
