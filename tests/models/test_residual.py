"""Norm placements: each formula by hand, what keeps the residual stream in bounds, and what cannot be combined.

Guards against: a norm behind a top-1 MoE without shared expert, which takes the router's task gradient away.
"""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.layers.attention import AttentionConfig
from moe.layers.mixture_of_attention import MixtureOfAttentionConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.models.residual import Form, Norm, Residual
from moe.routing.hashed import HashConfig
from moe.routing.topk import TopKConfig
from tests import grid, oracle
from tests.routing.contexts import context_for

B, S, D = 2, 5, 16
NORMS: tuple[Any, ...] = get_args(Norm)
MLP, NO_BIAS = MLPConfig(hidden=8), jnp.zeros(0)


def rms(x: Any) -> np.ndarray:
    return np.sqrt(np.square(np.asarray(x, np.float64)).mean(axis=-1))


def normed(x: Any, gain: Any = 1.0) -> np.ndarray:
    return np.asarray(x) / rms(x)[..., None] * gain


def residual(form: Form, config: Any = MLP, depth: float = 4.0) -> Residual:
    return Residual(config, form, jax.random.key(0), width=D, depth=depth, init_std=0.5)


@pytest.mark.parametrize("form", get_args(Form))
def test_every_form_is_its_formula(form: Form) -> None:
    module = residual(form)
    params = param.pure(module)
    gains = {name: np.linspace(0.5, 2.0, D, dtype=np.float32) * n for n, name in enumerate(("norm", "post_norm"), 1)}
    gains = {name: gain for name, gain in gains.items() if name in params}
    module = param.bind(module, params | {name: {"scale": jnp.asarray(gain)} for name, gain in gains.items()})
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)

    def f(x: Any) -> np.ndarray:
        return np.asarray(module.sublayer(jnp.asarray(x, jnp.float32), context_for(B, S), NO_BIAS)[0])

    read = normed(x, gains.get("norm", 1.0))
    expected = {
        "pre": lambda: x + f(read),
        "post": lambda: normed(x + f(x), gains["norm"]),
        "sandwich": lambda: x + normed(f(read), gains["post_norm"]),
        "bare": lambda: x + f(x),
        "normed": lambda: read + f(read),
    }[form]()
    y, stats = module(jnp.asarray(x), context_for(B, S), NO_BIAS)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    decoded, _ = module.decode(jnp.asarray(x), context_for(B, S), NO_BIAS, ())
    np.testing.assert_array_equal(decoded, y)
    assert stats is None
    names = {"pre": {"norm"}, "post": {"norm"}, "sandwich": {"norm", "post_norm"}, "bare": set(), "normed": {"norm"}}
    assert set(params) == names[form] | {"mlp"}


def model(norm: Norm, num_layers: int = 3, **changes: Any) -> DecoderConfig:
    head_norm: Any = "qkv" if norm.startswith("hybrid") else "none"
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_width=8, head_norm=head_norm)
    moe = MoEConfig(num_experts=4, expert_hidden=8, router=TopKConfig(init_std=0.3))
    return grid.model_config(**{"norm": norm, "num_layers": num_layers, "attention": attention, "moe": moe} | changes)


def inputs(config: DecoderConfig) -> tuple[Any, Any, Any]:
    params = jax.jit(lambda: param.pure(config.build(jax.random.key(0))))()
    arrays = {name: value[:2] for name, value in grid.batch().items()}
    return params, oracle.context_of(arrays), jnp.zeros((config.num_moe_layers, 4))


@pytest.mark.parametrize("norm", NORMS[1:])
def test_scanned_layers_equal_a_python_loop_and_every_parameter_learns(norm: Norm) -> None:
    config = model(norm, num_layers=2)
    params, context, bias = inputs(config)

    def loss(params: Any) -> Any:
        logits, _ = param.bind(config.abstract(), params)(context, bias)
        return jnp.sin(logits).mean(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a).logits)(params, context, bias)
    grid.close(logits, expected, "logits")
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_hybrid_blocks_carry_on_a_normed_tensor() -> None:
    """x - f(N(y)) behind a feed-forward is N(y): its rms is the gain at every layer, so the stream cannot grow."""
    config = model("hybrid", num_layers=2)
    params, context, bias = inputs(config)

    @jax.jit
    def added(params: Any) -> list[tuple[jax.Array, ...]]:
        stream = oracle.unrolled(config.abstract(), params, context, bias).stream
        found = []
        for place, module in enumerate(oracle.residuals(param.bind(config.abstract(), params))):
            before, after = stream[place : place + 2]
            assert module.form == ("normed" if place % 2 else "bare")
            if module.form == "normed":
                found.append((after, module.sublayer(module.read(before), context, bias[0])[0]))
            else:
                larger, _ = module(100.0 * before, context, NO_BIAS)
                found.append((after - before, larger - 100.0 * before))
        return found

    for place, (first, second) in enumerate(added(params)):
        if place % 2:
            np.testing.assert_allclose(rms(first - second), 1.0, rtol=1e-3)
        else:  # the heads are normalised, so a larger stream gets the same from attention
            np.testing.assert_allclose(first, second, atol=2e-3)


def test_hybrid_star_differs_from_hybrid_in_the_first_block_alone() -> None:
    star, base = model("hybrid_star"), model("hybrid")
    assert [(len(stack.layers), stack.repeats) for stack in star.layout] == [(2, 1), (2, 2)]
    bound = {
        name: oracle.residuals(param.bind(config.abstract(), inputs(config)[0]))
        for name, config in (("*", star), ("", base))
    }
    assert [module.form for module in bound["*"]] == ["pre", "pre", "bare", "normed", "bare", "normed"]
    assert [module.form for module in bound[""]] == ["bare", "normed"] * 3
    for ours, theirs in zip(bound["*"], bound[""], strict=True):
        jax.tree.map(np.testing.assert_array_equal, param.pure(ours.sublayer), param.pure(theirs.sublayer))
    assert set(param.pure(bound["*"][0])) == {"attention", "norm"} and set(param.pure(bound[""][0])) == {"attention"}


def test_a_block_of_several_feed_forwards_is_the_first_block_as_a_whole() -> None:
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_width=8, head_norm="qkv")
    stack = StackConfig(layers=(attention, MLP, MLP, attention, MLP), repeats=2)
    config = DecoderConfig(width=16, norm="hybrid_star", stacks=(stack,))
    forms = [module.form for pattern in config.abstract().stacks for module in pattern]
    assert forms == ["pre"] * 3 + ["bare", "normed", "bare", "normed", "normed", "bare", "normed"]  # two stacks


def stream_rms(config: DecoderConfig, gain: float | None = None) -> float:
    """rms of the residual stream behind the last layer; `gain`: of all norms on outputs."""
    params, context, bias = inputs(config)
    bound = param.bind(config.abstract(), params)
    if gain is not None:
        for pattern in bound.stacks:
            for module in pattern:
                module.post_norm.scale[...] = jnp.full_like(module.post_norm.scale[...], gain)
    bound.final_norm = bound.logits = lambda x: x
    return float(rms(jax.jit(lambda context: bound(context, bias)[0])(context)).mean())


def test_a_sandwich_keeps_the_stream_of_order_one_at_any_depth() -> None:
    shallow, deep = model("sandwich", num_layers=4), model("sandwich", num_layers=64)
    # sqrt((0.1 sqrt(32))^2 + 0.283^2 + 0.432^2) = 0.77 if all outputs were independent
    for config in (shallow, deep):
        assert 0.7 < stream_rms(config) < 1.0
    # With gain 1 it grows as sqrt(2 L): by 4 from 4 to 64 layers.
    assert 2.5 < stream_rms(deep, gain=1.0) / stream_rms(shallow, gain=1.0) < 6.0


def test_every_increment_of_a_sandwich_has_the_size_of_its_gain() -> None:
    config = model("sandwich", num_layers=4, dense_layers=2, mlp_hidden=8)
    params, context, bias = inputs(config)
    modules = oracle.residuals(param.bind(config.abstract(), params))
    gains = [0.283 / 2, 0.432 / 2] * 4  # c / sqrt(L), L = 4
    for module, gain in zip(modules, gains, strict=True):
        np.testing.assert_allclose(module.post_norm.scale[...], gain, rtol=1e-6)
    stream = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a).stream)(params, context, bias)
    real = np.asarray(context.mask_BS)  # no expert serves padding
    for before, after, gain in zip(stream[:-1], stream[1:], gains, strict=True):
        np.testing.assert_allclose(rms(after - before)[real], gain, rtol=5e-2)  # less the norm's epsilon
    both = ParallelConfig(parts=(AttentionConfig(), MLP))
    assert np.isclose(both.output_scale, np.sqrt(0.283**2 + 0.432**2))


TOP1 = MoEConfig(num_experts=4, expert_hidden=8, router=TopKConfig(num_selected=1, init_std=0.3))


@pytest.mark.parametrize(
    ("moe", "learns"),
    [
        (TOP1, False),
        (dataclasses.replace(TOP1, shared_hidden=8), True),
        (dataclasses.replace(TOP1, router=TopKConfig(num_selected=2)), True),
    ],
    ids=["top-1", "shared", "top-2"],
)
def test_a_norm_behind_experts_silences_a_lone_router_and_is_refused(moe: MoEConfig, learns: bool) -> None:
    module = residual("sandwich", moe)
    x = jax.random.normal(jax.random.key(1), (B, S, D))

    def loss(params: Any) -> Any:
        y, _ = param.bind(module, params)(x, context_for(B, S), jnp.zeros(4))
        return jnp.sin(3 * y).sum()

    gradient = jax.jit(jax.grad(loss))(param.pure(module))["moe"]
    relative = float(jnp.abs(gradient["router"]["w_router"]).max() / jnp.abs(gradient["w_down"]).max())
    assert (relative > 1e-2) == learns and (relative < 1e-4) != learns
    config = model("sandwich", moe=moe)
    if learns:
        check(config, "model")
        return
    with pytest.raises(
        ConfigError, match=r"^model\.norm = 'sandwich': would divide out the only weight of model\.moe,"
    ):
        check(config, "model")
    check(dataclasses.replace(config, norm="pre"), "model")


def test_a_sandwich_around_one_expert_is_for_a_router_that_learns_nothing_from_the_task() -> None:
    check(model("sandwich", moe=MoEConfig(num_experts=4, expert_hidden=8, router=HashConfig())), "model")


def test_hybrid_without_normed_heads_is_refused() -> None:
    said = r"head_norm = 'qk': must have head_norm='qkv', as norm='hybrid' does not normalise its input$"
    heads = AttentionConfig(head_norm="qk")
    with pytest.raises(ConfigError, match=r"^model\.attention\." + said):
        check(DecoderConfig(norm="hybrid", attention=heads), "model")
    stacks = (StackConfig(layers=(dataclasses.replace(heads, head_norm="qkv"), MLP)), StackConfig(layers=(heads,)))
    with pytest.raises(ConfigError, match=r"^model\.stacks\.1\.layers\.0\." + said):
        check(DecoderConfig(norm="hybrid", stacks=stacks), "model")
    check(DecoderConfig(norm="hybrid", stacks=stacks[:1]), "model")
    mixture = StackConfig(layers=(MixtureOfAttentionConfig(attention=heads), MLP))
    with pytest.raises(ConfigError, match=r"^model\.stacks\.0\.layers\.0\.attention\." + said):
        check(DecoderConfig(norm="hybrid", stacks=(mixture,)), "model")
    beside = StackConfig(layers=(ParallelConfig(parts=(stacks[0].layers[0], MLP)),))
    with pytest.raises(ConfigError, match=r"^model\.stacks\.0\.layers\.0 = ParallelConfig.*: must have head_norm"):
        check(DecoderConfig(norm="hybrid_star", stacks=(beside,)), "model")
