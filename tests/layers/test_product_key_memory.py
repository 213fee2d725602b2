"""Product keys against scoring every slot, and the memory against a loop over tokens, heads and slots."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.layers.peer import PEERConfig
from moe.layers.product_key_memory import ProductKeyMemory, ProductKeyMemoryConfig
from moe.routing.base import SAVED_NAME
from tests.layers.sublayers import B, D, S, build, check_contract, inputs, run, value_and_gradient
from tests.routing.contexts import context_for

CONFIG = ProductKeyMemoryConfig(num_keys=5, num_heads=3, num_selected=4, key_width=6)
VARIANTS = [CONFIG, dataclasses.replace(CONFIG, weights="relu", query_norm=False),
            dataclasses.replace(CONFIG, gated=True, num_selected=25)]  # fmt: skip


def all_scores(module: ProductKeyMemory, x: np.ndarray) -> np.ndarray:
    """float64 [B, S, H, n^2]: every slot's score, from the definition."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), param.pure(module))["lookup"]
    config = module.config
    scores = np.zeros((*x.shape[:2], config.num_heads, config.num_slots))
    for at in np.ndindex(scores.shape[:3]):
        b, s, h = at
        q = x[b, s].astype(np.float64) @ w["w_query"][:, h]
        if "query_norm" in w:
            q = q / np.sqrt(np.mean(q**2) + 1e-6) * w["query_norm"]["scale"]
        half = len(q) // 2
        for i in range(config.num_keys):
            for j in range(config.num_keys):
                row, column = w["keys"][0, h, i], w["keys"][1, h, j]
                scores[at][i * config.num_keys + j] = q[:half] @ row + q[half:] @ column
    return scores


def by_loop(module: ProductKeyMemory, x: np.ndarray) -> np.ndarray:
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), param.pure(module))
    y = np.zeros(x.shape)
    every = all_scores(module, x)
    for b, s, h in np.ndindex(every.shape[:3]):
        scores = every[b, s, h]
        best = np.argsort(-scores)[: module.config.num_selected]
        weight = np.maximum(scores[best], 0)
        if module.config.weights == "softmax":
            weight = np.exp(scores[best]) / np.exp(scores[best]).sum()
        y[b, s] += weight @ w["values"][best]
    if module.config.gated:
        gate = x @ w["w_gate"]
        y = (y * gate / (1 + np.exp(-gate))) @ w["w_out"]
    return y


def test_two_stages_find_what_scoring_every_slot_finds() -> None:
    for seed, num_selected in ((0, 4), (1, 1), (2, 7), (3, 25)):  # 7 and 25: more than one half's five keys
        module = build(dataclasses.replace(CONFIG, num_selected=num_selected), seed=seed)
        x = inputs(seed)
        slots, scores = module.lookup.best(x)
        every = all_scores(module, np.asarray(x))
        expected = np.argsort(-every, axis=-1)[..., :num_selected]
        np.testing.assert_array_equal(slots, expected)
        np.testing.assert_allclose(scores, np.take_along_axis(every, expected, -1), rtol=1e-4, atol=1e-5)
        assert scores.dtype == jnp.float32 and slots.dtype == jnp.int32


@pytest.mark.parametrize("config", VARIANTS, ids=["softmax", "relu", "gated, all slots"])
def test_it_equals_a_loop_over_tokens_heads_and_slots(config: ProductKeyMemoryConfig) -> None:
    module, x = build(config), inputs()
    np.testing.assert_allclose(run(module, x), by_loop(module, np.asarray(x)), rtol=1e-4, atol=1e-4)


def test_reading_every_slot_is_a_dense_layer() -> None:
    # All n^2 slots under softmax: attention over the whole table, with no top-k left in it.
    module, x = build(dataclasses.replace(CONFIG, num_selected=25)), inputs()
    share = jax.nn.softmax(jnp.asarray(all_scores(module, np.asarray(x)), jnp.float32))
    dense = jnp.einsum("bshv,vd->bsd", share, module.values[...])
    np.testing.assert_allclose(run(module, x), dense, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_rows_a_token_reads_and_no_others() -> None:
    config = dataclasses.replace(CONFIG, num_keys=8, num_heads=2, num_selected=3)
    module, x = build(config), inputs()[:1, :1]
    _, (gradient, _) = jax.jit(lambda *a: value_and_gradient(module, *a))(param.pure(module), x, context_for(1, 1))
    moved = np.flatnonzero(np.abs(np.asarray(gradient["values"])).max(axis=1))
    slots, _ = module.lookup.best(x)
    assert set(moved) == set(np.asarray(slots).reshape(-1).tolist()) and 3 <= len(moved) <= 6


def test_recomputation_keeps_the_slots_that_were_found() -> None:
    module, context = build(CONFIG), context_for(B, S)

    def top_ks(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        run = jax.checkpoint(lambda x: module(x, context, None)[0], policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda x: run(x).sum()))(inputs())).count("top_k[")

    assert (top_ks(SAVED_NAME), top_ks("nothing")) == (3, 6)  # two halves and their sums, once or twice


def test_renaming_slots_changes_nothing() -> None:
    module, x, n = build(CONFIG), inputs(), CONFIG.num_keys
    order = jax.random.permutation(jax.random.key(3), n)
    params = param.pure(module)
    keys = params["lookup"]["keys"]
    renamed = params | {
        "lookup": params["lookup"] | {"keys": keys.at[0].set(keys[0][:, order])},
        "values": params["values"].reshape(n, n, D)[order].reshape(n * n, D),
    }
    np.testing.assert_allclose(run(param.bind(module, renamed), x), run(module, x), rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(param.bind(module, params | {"values": renamed["values"]}), x), run(module, x))


@pytest.mark.parametrize("config", VARIANTS[1:], ids=["relu", "gated"])
def test_it_keeps_the_contract_of_sublayers(config: ProductKeyMemoryConfig) -> None:
    check_contract(dataclasses.replace(config, num_selected=4))


def test_parameters_active_share_and_multiply_adds_are_the_formulas() -> None:
    n, H, K, Q = 5, 3, 4, 6
    size = lambda config: sum(leaf.size for leaf in jax.tree.leaves(param.pure(build(config))))  # noqa: E731
    plain = n * n * D + D * H * Q + H * 2 * n * Q // 2
    assert size(dataclasses.replace(CONFIG, query_norm=False)) == plain
    assert size(CONFIG) == plain + Q
    assert size(dataclasses.replace(CONFIG, gated=True)) == plain + Q + 2 * D * D
    assert CONFIG.active_share == H * K / n**2
    assert dataclasses.replace(CONFIG, num_selected=25).active_share == 1.0
    lookup = D * H * Q + 2 * H * n * Q // 2
    assert CONFIG.multiply_adds(D, S) == lookup + H * K * D
    assert dataclasses.replace(CONFIG, gated=True).multiply_adds(D, S) == lookup + H * K * D + 2 * D * D


def test_initial_values_have_the_documented_standard_deviation() -> None:
    # 16 layers: out_std = init_std / sqrt(32); sqrt(2 / (16 * 32^2)) = 0.01105.
    wide, out_std = dataclasses.replace(CONFIG, num_keys=32), 0.02 / 32**0.5
    values = build(wide, 100, 0.02, out_std).values[...]
    assert abs(float(values.std()) / 0.1 - 0.987) < 0.02
    values = build(dataclasses.replace(wide, value_init="dense_equivalent"), 100, 0.02, out_std).values[...]
    assert abs(float(values.std()) / 0.01105 - 0.987) < 0.02


@pytest.mark.parametrize("kind", [ProductKeyMemoryConfig, PEERConfig])
def test_no_device_gathers_a_table_or_the_scores_of_other_sequences(kind: type) -> None:
    module = build(kind(num_keys=16, num_heads=3, num_selected=4, key_width=6))
    mesh = axes.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, expert=2, expert_tensor=2))
    params = jax.device_put(param.pure(module), param.shardings(module, mesh))
    x = jax.device_put(inputs(), axes.sharding(mesh, ("batch", "position", None)))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *a: value_and_gradient(module, *a)).lower(params, x, context_for(B, S)).compile()
    text = program.as_text()
    assert set(re.findall(r"f32\[256,\d+\]", text)) == {f"f32[256,{D // 8}]"}  # a slice of every row
    gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text)
    assert f"s32[{B},{S},3,4]" in gathered  # slots
    assert f"f32[{B},{S},3,16]" not in gathered  # scores
    assert f"f32[{B},{S},{D}]" not in gathered  # token vectors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_selected": 26}, r"num_selected = 26: must be at most num_keys\^2 = 25"),
        ({"key_width": 7}, "key_width = 7: must be even"),
        ({"num_heads": 0}, "num_heads = 0: must be at least 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(dataclasses.replace(CONFIG, **changes))
