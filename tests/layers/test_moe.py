"""The MoE layer: experts by hand, the shared expert, statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.balance.statistics import Statistics
from moe.config import ConfigError, check
from moe.dispatch import CapacityConfig, DenseConfig, DispatchConfig, DroplessConfig
from moe.layers.moe import MoE, MoEConfig
from moe.routing.base import Context
from moe.routing.topk import TopKConfig

B, S, D, E, F = 2, 5, 6, 4, 8
CONFIG = MoEConfig(num_experts=E, expert_hidden=F, shared_hidden=8, router=TopKConfig(num_selected=2, normalise="sum"))
SEGMENT = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], np.int32)
NO_BIAS = np.zeros(E, np.float32)


def layer(config: MoEConfig = CONFIG) -> MoE:
    return MoE(config, jax.random.key(0), D, 0.5, 0.5)


def context(segment: np.ndarray = SEGMENT) -> Context:
    zeros = jnp.zeros(segment.shape, jnp.int32)
    return Context(
        token_BS=zeros, segment_BS=jnp.asarray(segment), position_BS=zeros, task_BS=zeros,
        sequence_B=jnp.arange(segment.shape[0]), step=jnp.int32(0), key=jax.random.key(0),
    )  # fmt: skip


def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def run(module: MoE, x: jax.Array, bias: np.ndarray = NO_BIAS) -> tuple[jax.Array, Statistics]:
    return jax.jit(lambda x, bias: module(x, context(), bias))(x, bias)


def by_loop(module: MoE, x: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output and statistics, token by token."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), param.pure(module))
    y, count, prob, z = np.zeros(x.shape), np.zeros((B, E), int), np.zeros((B, E)), np.zeros(B)
    for b in range(B):
        for s in range(S):
            if "shared" in w:
                y[b, s] += gated(x[b, s], *(w["shared"][name] for name in ("w_gate", "w_up", "w_down")))
            if SEGMENT[b, s] == 0:
                continue
            logits = x[b, s] @ w["router"]["w_router"]
            p = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-(p + bias))[:2]
            prob[b] += p
            z[b] += np.log(np.exp(logits).sum()) ** 2
            for e in chosen:
                count[b, e] += 1
                y[b, s] += p[e] / p[chosen].sum() * gated(x[b, s], w["w_gate"][e], w["w_up"][e], w["w_down"][e])
    return y, {"count_BE": count, "prob_BE": prob, "z_B": z, "tokens_B": np.array([4, 5]), "dropped_B": np.zeros(2)}


@pytest.mark.parametrize("dispatch", [DroplessConfig(), DenseConfig(), CapacityConfig(capacity_factor=4.0)], ids=str)
@pytest.mark.parametrize("bias", [NO_BIAS, np.array([0.5, -0.5, 0.1, 0.0], np.float32)], ids=["no bias", "bias"])
def test_output_and_statistics_equal_a_loop_over_tokens(dispatch: DispatchConfig, bias: np.ndarray) -> None:
    module, x = layer(dataclasses.replace(CONFIG, dispatch=dispatch)), inputs()
    y, stats = run(module, jnp.asarray(x), bias)
    expected, sums = by_loop(module, x, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, value in sums.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-5, err_msg=name)


def test_counts_by_hand() -> None:
    # Token t of every sequence has the one-hot vector t; the router sends it where its row says.
    module = layer(dataclasses.replace(CONFIG, router=TopKConfig(num_selected=1), shared_hidden=0))
    params = param.pure(module)
    w_router = jnp.zeros((D, E)).at[jnp.arange(5), jnp.array([3, 1, 1, 3, 0])].set(9.0)
    module = param.bind(module, params | {"router": {"w_router": w_router}})
    x = jnp.broadcast_to(jnp.eye(S, D), (B, S, D))
    y, stats = run(module, x)
    np.testing.assert_array_equal(stats.count_BE, [[0, 2, 0, 2], [1, 2, 0, 2]])
    np.testing.assert_array_equal(stats.tokens_B, [4, 5])
    np.testing.assert_array_equal(y[0, 4], np.zeros(D))  # padding reaches no expert
    np.testing.assert_allclose(stats.prob_BE.sum(axis=-1), [4, 5], rtol=1e-6)


def test_drops_are_counted_and_the_load_counts_them_too() -> None:
    # A buffer of ceil(0.5 * 5 / 4) = 1 per expert and sequence.
    config = dataclasses.replace(
        CONFIG, router=TopKConfig(num_selected=1), shared_hidden=0, dispatch=CapacityConfig(capacity_factor=0.5)
    )
    module = layer(config)
    w_router = jnp.zeros((D, E)).at[jnp.arange(5), jnp.array([3, 1, 1, 3, 3])].set(9.0)
    module = param.bind(module, param.pure(module) | {"router": {"w_router": w_router}})
    y, stats = run(module, jnp.broadcast_to(jnp.eye(S, D), (B, S, D)))
    np.testing.assert_array_equal(stats.count_BE, [[0, 2, 0, 2], [0, 2, 0, 3]])
    np.testing.assert_array_equal(stats.dropped_B, [2, 3])
    np.testing.assert_array_equal((y != 0).any(axis=-1), [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]])


def test_the_shared_expert_adds_to_the_routed_ones() -> None:
    module, x = layer(), jnp.asarray(inputs())
    assert module.shared is not None
    params = param.pure(module)
    alone = dict(params)
    shared = alone.pop("shared")
    routed = param.bind(layer(dataclasses.replace(CONFIG, shared_hidden=0)), alone)
    y, stats = run(module, x)
    without, same = run(routed, x)
    np.testing.assert_allclose(y, without + module.shared(x), rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, same)
    assert shared["w_gate"].shape == (D, 8) and routed.shared is None


def test_bfloat16_is_kept_while_statistics_are_float32_and_int32() -> None:
    module, x = layer(), jnp.asarray(inputs())
    y, stats = run(module, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    dtypes = {name: leaf.dtype for name, leaf in vars(stats).items() if isinstance(leaf, jax.Array)}
    assert dtypes == {
        "count_BE": jnp.int32, "prob_BE": jnp.float32, "z_B": jnp.float32, "tokens_B": jnp.int32,
        "dropped_B": jnp.int32, "unserved_B": jnp.int32, "chosen_prob_B": jnp.float32, "margin_B": jnp.float32,
    }  # fmt: skip
    # The router reads the rounded tokens, but computes in float32: exactly what it makes of them as float32.
    _, exact = run(module, x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(stats.prob_BE, exact.prob_BE)
    np.testing.assert_array_equal(stats.count_BE, exact.count_BE)


def test_every_parameter_gets_a_gradient() -> None:
    module, x = layer(), jnp.asarray(inputs())

    def loss(params: dict) -> jax.Array:
        y, _ = param.bind(module, params)(x, context(), NO_BIAS)
        return jnp.square(y).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(param.pure(module))):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MoEConfig(num_experts=4, router=TopKConfig(num_selected=5)), "router.num_selected = 5: .* num_experts = 4"),
        (MoEConfig(num_experts=1), "num_experts = 1: must be at least 2"),
        (MoEConfig(shared_hidden=-1), "shared_hidden = -1: must be at least 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: MoEConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        check(config)
