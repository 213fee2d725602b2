"""Every dispatcher with every exchange on every folding gives the dense oracle's outputs and gradients.

Guards against: expert gradients times the expert-parallel degree (DeepSpeed #5618, pytorch #160285), experts that
silently never train (Megatron PR #6228), wrong gradients beside empty experts (tokamax #887), both expert-parallel
ranks holding the same experts (DeepSpeed #6589), values typed as replicated that are not (MaxText, `check_vma`), a
gradient norm that counts folded parameters twice or not at all (Megatron PR #5916).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch import (
    AllToAllConfig,
    CapacityConfig,
    DenseConfig,
    DispatchConfig,
    DroplessConfig,
    ExchangeConfig,
    ExpertWeights,
    RaggedConfig,
)
from tests.dispatch.cases import FOLDINGS, RING, B, D, E, K, S, expert_weights, loop, run, token_choice
from tests.grid import close, close_trees

EXACT: dict[str, DispatchConfig] = {
    "dense": DenseConfig(), "dropless": DroplessConfig(), "capacity": CapacityConfig(capacity_factor=float(E)),
}  # fmt: skip
DENSE, DROPLESS, LARGE = EXACT.values()
WORST, RERUN = AllToAllConfig(), AllToAllConfig(budget=1.0, on_overflow="rerun")

CUT_2222 = "fsdp 2 context 2 tensor 2, expert 2 2"
COVER: list[tuple[str, str, DispatchConfig, ExchangeConfig]] = [
    ("1 device", "padded", DROPLESS, WORST),
    ("data 8", "ragged", DROPLESS, RING),
    ("data 8, expert 8", "ragged", LARGE, RING),
    ("data 2 fsdp 4, expert 2", "two experts", LARGE, WORST),
    ("fsdp 4 tensor 2, expert 2 2", "padded", DENSE, RING),
    ("fsdp 4 tensor 2, expert 2 2", "padded", DROPLESS, AllToAllConfig(drop_duplicates=False)),
    ("data 4 tensor 2, expert 2", "full", DENSE, WORST),
    ("fsdp 2 tensor 4, expert 1 4", "ragged", DROPLESS, WORST),
    (CUT_2222, "padded", DROPLESS, WORST),
    (CUT_2222, "two experts", DROPLESS, WORST),
    (CUT_2222, "ragged", DROPLESS, AllToAllConfig(drop_duplicates=False)),
    (CUT_2222, "two experts", LARGE, RING),
    (CUT_2222, "ragged", DROPLESS, RERUN),
    ("data 2 context 2 tensor 2, expert 8", "two experts", DROPLESS, RERUN),
    ("data 2 context 2 tensor 2, expert 8", "padded", DROPLESS, AllToAllConfig(hierarchical=True)),
    ("context 4 tensor 2, expert 4 2", "ragged", DENSE, RING),
    ("context 4 tensor 2, expert 4 2", "ragged", LARGE, WORST),
    ("data 2 fsdp 2 context 2, expert 4", "ragged", DROPLESS, AllToAllConfig(hierarchical=True, chunks=3)),
    ("data 2 fsdp 2 context 2, expert 4", "two experts", DROPLESS, AllToAllConfig(chunks=3)),
    ("fsdp 8, expert 2 4", "padded", DROPLESS, WORST),
    (CUT_2222, "padded", DROPLESS, RaggedConfig()),
    ("context 4 tensor 2, expert 4 2", "ragged", DROPLESS, RaggedConfig()),
    ("data 2 fsdp 2 context 2, expert 4", "two experts", DROPLESS, RaggedConfig()),
]


@pytest.mark.parametrize("case", ["full", "padded", "two experts", "ragged"])
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT.keys())
def test_every_exact_dispatcher_equals_the_loop_and_the_dense_gradient(config: DispatchConfig, case: str) -> None:
    (y, dropped), grads = run(config, case)
    close(y, loop(case), "y")
    assert not dropped.any()
    close_trees(grads, run(DenseConfig(), case)[1], "gradient")


@pytest.mark.parametrize("folding,case,config,exchange", COVER, ids=lambda value: str(value)[:40])
def test_over_a_mesh_everything_equals_dense_without_one(
    folding: str, case: str, config: DispatchConfig, exchange: ExchangeConfig
) -> None:
    (y, dropped), grads = run(config, case, folding, exchange)
    (expected, _), expected_grads = run(DENSE, case)
    close(y, expected, "y")
    close_trees(grads, expected_grads, "gradient")
    assert not dropped.any()


def test_the_cover_holds_every_folding_case_dispatcher_and_exchange() -> None:
    foldings, cases, configs, exchanges = (set(column) for column in zip(*COVER, strict=True))
    assert foldings >= set(FOLDINGS) - {"none", "data 2, expert 2", "fsdp 2 tensor 2, expert 2 2"}
    assert cases == {"full", "padded", "two experts", "ragged"} and configs == {*EXACT.values()}
    assert {type(one) for one in exchanges} == set(ExchangeConfig.__subclasses__())
    for exchange in (RING, WORST):  # with and without a common K, where positions are cut over both axes
        assert {case == "ragged" for f, case, _, e in COVER if e == exchange and "context" in f} == {True, False}


@pytest.mark.parametrize("keep", ["order", "score"])
@pytest.mark.parametrize(
    "folding,exchange", [("data 8", RING), ("data 8, expert 8", RING), (CUT_2222, WORST)], ids=["8", "ring", "all"]
)
def test_a_mesh_drops_what_one_device_drops(folding: str, exchange: ExchangeConfig, keep: Any) -> None:
    config = CapacityConfig(capacity_factor=0.5, keep=keep)
    (y, dropped), grads = run(config, "two experts", folding, exchange)
    (expected, expected_dropped), expected_grads = run(config, "two experts")
    assert expected_dropped.sum() > 0
    np.testing.assert_array_equal(dropped, expected_dropped)
    close(y, expected, "y")
    close_trees(grads, expected_grads, "gradient")


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT.keys())
def test_experts_without_tokens_get_no_gradient_and_all_others_some(config: DispatchConfig) -> None:
    for name in ("none", "data 8, expert 8"):
        _, (_, _, weights) = run(config, "two experts", name)
        moved = [{e for e in range(E) if np.abs(w[e]).max() > 0} for w in weights]
        assert moved == [{3, 5}] * 3
        _, (_, _, weights) = run(config, "full", name)
        assert all((np.abs(w).max(axis=(1, 2)) > 0).all() for w in weights)


def test_the_combine_weight_scales_the_output_linearly() -> None:
    x, w = jax.random.normal(jax.random.key(5), (B, S, D)), expert_weights()
    for config in EXACT.values():
        y = jax.jit(lambda factor: config.build()(x, token_choice("full", factor * jnp.ones((B, S * K))), w)[0])  # noqa: B023
        np.testing.assert_allclose(y(3.0), 3 * y(1.0), rtol=1e-5, atol=1e-6)


def test_outputs_have_the_dtype_of_the_tokens() -> None:
    for config in EXACT.values():
        x, w = jnp.ones((B, S, D), jnp.bfloat16), ExpertWeights(*(w.astype(jnp.bfloat16) for w in expert_weights()))
        y, dropped = jax.jit(config.build())(x, token_choice("padded", jnp.ones((B, S * K))), w)
        assert y.dtype == jnp.bfloat16 and dropped.dtype == jnp.int32 and dropped.shape == (B,)
        assert not np.asarray(y, np.float32)[:, 4:].any(), "padding gets nothing"
