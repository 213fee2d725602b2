"""PEER against a loop over tokens, heads and experts of one hidden unit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.layers.peer import PEER, PEERConfig
from tests.layers.sublayers import B, D, S, build, check_contract, cuts, inputs, run, value_and_gradient
from tests.routing.contexts import context_for

CONFIG = PEERConfig(num_keys=5, num_heads=3, num_selected=4, key_width=6)
gelu = np.vectorize(lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))))


def by_loop(module: PEER, x: np.ndarray) -> np.ndarray:
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), param.pure(module))
    config, keys = module.config, w["lookup"]["keys"]
    n, half = config.num_keys, config.key_width // 2
    y = np.zeros(x.shape)
    for b, s, h in np.ndindex(*x.shape[:2], config.num_heads):
        q = x[b, s] @ w["lookup"]["w_query"][:, h]
        q = q / np.sqrt(np.mean(q**2) + 1e-6)
        scores = np.array([keys[0, h, v // n] @ q[:half] + keys[1, h, v % n] @ q[half:] for v in range(n * n)])
        best = np.argsort(-scores)[: config.num_selected]
        weight = np.maximum(scores[best], 0)
        if config.weights == "softmax":
            weight = np.exp(scores[best]) / np.exp(scores[best]).sum()
        for slot, share in zip(best, weight, strict=True):
            y[b, s] += share * gelu(w["w_up"][slot] @ x[b, s]) * w["w_down"][slot]
    return y


@pytest.mark.parametrize("weights", ["softmax", "relu"])
@pytest.mark.parametrize("num_selected", [1, 4, 25])
def test_it_equals_a_loop_over_tokens_heads_and_experts(weights: str, num_selected: int) -> None:
    module, x = build(dataclasses.replace(CONFIG, weights=weights, num_selected=num_selected)), inputs()
    np.testing.assert_allclose(run(module, x), by_loop(module, np.asarray(x)), rtol=1e-4, atol=1e-4)


def test_every_expert_with_equal_weight_is_a_dense_layer_of_as_many_hidden_units() -> None:
    # Keys of zero score every slot alike: softmax gives 1 / 25 to each of the 25, in each of the 3 heads.
    module, x = build(dataclasses.replace(CONFIG, num_selected=25)), inputs()
    params = param.pure(module)
    flat = params | {"lookup": params["lookup"] | {"keys": jnp.zeros_like(params["lookup"]["keys"])}}
    dense = jax.nn.gelu(x @ params["w_up"].T, approximate=False) @ params["w_down"]
    np.testing.assert_allclose(run(param.bind(module, flat), x), dense * 3 / 25, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_rows_a_token_reads_and_no_others() -> None:
    module, x = build(dataclasses.replace(CONFIG, num_keys=8, num_heads=2, num_selected=3)), inputs()[:1, :1]
    _, (gradient, _) = jax.jit(lambda *a: value_and_gradient(module, *a))(param.pure(module), x, context_for(1, 1))
    read = set(np.asarray(module.lookup.best(x)[0]).reshape(-1).tolist())
    for table in ("w_up", "w_down"):
        moved = np.flatnonzero(np.abs(np.asarray(gradient[table])).max(axis=1))
        assert set(moved) == read and 3 <= len(moved) <= 6, table


def test_it_keeps_the_contract_of_sublayers() -> None:
    check_contract(CONFIG)
    assert cuts(build(CONFIG))["w_up"] == axes.spec((None, "memory_width"))


def test_parameters_active_share_and_multiply_adds_are_the_formulas() -> None:
    n, H, K, Q = 5, 3, 4, 6
    size = sum(leaf.size for leaf in jax.tree.leaves(param.pure(build(CONFIG))))
    assert size == 2 * n * n * D + D * H * Q + H * n * Q + Q
    assert CONFIG.active_share == H * K / n**2
    assert CONFIG.multiply_adds(D, S) == D * H * Q + H * n * Q + 2 * H * K * D


def test_initial_weights_have_the_documented_standard_deviations() -> None:
    params = param.pure(build(dataclasses.replace(CONFIG, num_keys=20), 100, 0.02, 0.005))
    assert abs(float(params["w_up"].std()) / 0.02 - 0.987) < 0.02
    assert abs(float(params["w_down"].std()) / 0.005 - 0.987) < 0.02
    assert abs(float(params["lookup"]["w_query"].std()) / 0.02 - 0.987) < 0.05
    keys = np.abs(np.asarray(params["lookup"]["keys"]))
    assert 0.95 * 6**-0.5 < keys.max() <= 6**-0.5


def test_a_token_is_read_by_itself_and_none_is_dropped() -> None:
    module, x = build(CONFIG), inputs()
    whole = run(module, x)
    for b, s in ((0, 0), (B - 1, S - 1)):
        np.testing.assert_allclose(run(module, x[b : b + 1, s : s + 1])[0, 0], whole[b, s], rtol=1e-5, atol=1e-6)
    assert bool((jnp.abs(whole).max(axis=-1) > 0).all())
