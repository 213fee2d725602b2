"""Layers spelled out: pyramids, several routed sublayers in a pattern, and a grouping that changes nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.layers.attention import AttentionConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig, parse_layout
from moe.routing.topk import TopKConfig
from tests import grid, oracle

A = AttentionConfig(num_heads=2, num_kv_heads=1, head_width=8)
F = MLPConfig(hidden=16)


def experts(E: int, **changes: Any) -> MoEConfig:
    return MoEConfig(num_experts=E, expert_hidden=8, router=TopKConfig(init_std=0.3), **changes)


def model(*stacks: tuple[tuple[Any, ...], int], **changes: Any) -> DecoderConfig:
    return DecoderConfig(
        **{"vocab_size": grid.VOCAB, "width": 32, "init_std": 0.1} | changes,
        stacks=tuple(StackConfig(layers=layers, repeats=repeats) for layers, repeats in stacks),
    )


CONFIGS = {
    "pyramid": model(((A, experts(4)), 2), ((A, experts(8)), 1), remat="full"),
    "two widths in a pattern": model(((A, experts(8), experts(4)), 2), ((A, F), 1)),
    "brainformer": model((parse_layout("a m f a m f m f", a=A, m=experts(4), f=F), 1)),
    "parallel": model(((ParallelConfig(parts=(A, experts(4))), F), 2), ((A, experts(6)), 1)),
}
WIDTHS = {
    "pyramid": (4, 4, 8), "two widths in a pattern": (8, 4, 8, 4), "brainformer": (4, 4, 4), "parallel": (4, 4, 6),
}  # fmt: skip


@functools.cache
def inputs(name: str) -> tuple[Any, Any, Any]:
    """(parameters, context, bias): a bias that differs by layer and moves the selection."""
    config = CONFIGS[name]
    params = jax.jit(lambda: param.pure(config.build(jax.random.key(0))))()
    context = oracle.context_of({key: value[:3] for key, value in grid.batch().items()})
    return params, context, 0.2 * jax.random.normal(jax.random.key(2), config.exists_LE.shape)


def forward(config: DecoderConfig, params: Any, context: Any, bias: Any) -> Any:
    return param.bind(config.abstract(), params)(context, bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_stacks_equal_a_python_loop_over_separate_layers(name: str) -> None:
    config, (params, context, bias) = CONFIGS[name], inputs(name)
    logits, stats = jax.jit(lambda *a: forward(config, *a))(params, context, bias)
    expected = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a))(params, context, bias)
    grid.close(logits, expected.logits, "logits")
    widths = WIDTHS[name]
    assert config.num_experts_L == widths == tuple(routing.num_experts for routing in expected.routings)
    np.testing.assert_array_equal(stats.num_experts_L, widths)
    np.testing.assert_array_equal(stats.exists_LE, config.exists_LE)
    assert stats.count_BE.shape == (len(widths), 3, max(widths))
    for layer, (E, sums) in enumerate(zip(widths, expected.statistics, strict=True)):
        np.testing.assert_array_equal(stats.count_BE[layer, :, :E], sums.count_BE)
        np.testing.assert_allclose(stats.prob_BE[layer, :, :E], sums.prob_BE, rtol=1e-4, atol=1e-5)
        assert not stats.count_BE[layer, :, E:].any() and not stats.prob_BE[layer, :, E:].any()
        np.testing.assert_allclose(stats.z_B[layer], sums.z_B, rtol=1e-4)


def test_each_layer_is_moved_by_its_own_row_of_the_bias() -> None:
    """All of the bias on one expert of one layer: that layer's load moves there, and no earlier layer's moves."""
    name = "two widths in a pattern"
    config, (params, context, bias) = CONFIGS[name], inputs(name)
    run = jax.jit(lambda bias: forward(config, params, context, bias)[1].count_BE)
    before = np.asarray(run(0 * bias)).sum(axis=1)
    tokens = int(np.asarray(context.mask_BS).sum())
    for layer, expert in ((0, 7), (1, 3), (2, 0), (3, 2)):
        after = np.asarray(run((0 * bias).at[layer, expert].set(9.0))).sum(axis=1)
        assert after[layer, expert] == tokens > before[layer, expert]
        np.testing.assert_array_equal(after[:layer], before[:layer])


def test_the_statistics_of_every_layer_teach_its_router() -> None:
    name = "two widths in a pattern"
    config, (params, context, bias) = CONFIGS[name], inputs(name)

    def of_layer(params: Any, layer: int) -> Any:
        return jnp.square(forward(config, params, context, bias)[1].prob_BE[layer]).sum()

    gradient = jax.jit(jax.grad(of_layer))
    routed = [(1, 0), (2, 0), (1, 1), (2, 1)]  # (place in the pattern, repeat), in layer order
    for layer, (place, repeat) in enumerate(routed):
        found = gradient(params, layer)["stacks"][0]
        for other, (other_place, other_repeat) in enumerate(routed):
            w = found[other_place]["moe"]["router"]["w_router"][other_repeat]
            if other >= layer:  # a router learns from its own statistics, and from no earlier layer's
                assert bool((w != 0).any()) == ((other_place, other_repeat) == (place, repeat))


def test_the_grouping_into_stacks_changes_no_number() -> None:
    layers = (A, experts(4))
    one, parts = model((layers, 3)), model((layers, 1), (layers, 2))
    context = inputs("pyramid")[1]
    bias = 0.2 * jax.random.normal(jax.random.key(2), (3, 4))
    found = []
    for config in (one, parts):
        bound = config.build(jax.random.key(0))
        found.append((
            [param.pure(module) for module in oracle.residuals(bound)],
            *jax.jit(lambda bound=bound: bound(context, bias))(),
        ))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    grid.close(found[0][1], found[1][1], "logits")
    np.testing.assert_array_equal(found[0][2].count_BE, found[1][2].count_BE)
    assert found[0][2].widths == found[1][2].widths == ()


def test_output_projections_start_smaller_in_deeper_models() -> None:
    for config, sublayers in ((CONFIGS["brainformer"], 8), (model(((A, experts(4), F), 4)), 12)):
        params = param.pure(config.build(jax.random.key(0)))
        down = params["stacks"][0][1]["moe"]["w_down"]
        np.testing.assert_allclose(down.std(), 0.1 * 0.987 / np.sqrt(sublayers), rtol=0.05)


def test_a_stack_twice_as_deep_is_the_same_program() -> None:
    def text(repeats: int) -> str:
        config = dataclasses.replace(CONFIGS["parallel"], stacks=(
            dataclasses.replace(CONFIGS["two widths in a pattern"].stacks[0], repeats=repeats),
        ))  # fmt: skip
        params = jax.eval_shape(lambda: param.pure(config.build(jax.random.key(0))))
        context = inputs("pyramid")[1]
        bias = jnp.zeros(config.exists_LE.shape)
        loss = lambda p: forward(config, p, context, bias)[1].prob_BE.sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).as_text()

    assert len(text(24)) <= 1.05 * len(text(3))
