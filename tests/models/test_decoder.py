"""The decoder: causality, scan against a plain loop, remat, size of the program, parameters, dtypes.

Guards against: MaxText PRs #3664 and #4829 (scan lost the balance statistics), routers recomputed to other experts
(NeMo-Automodel PR #2635, torchtitan PR #3146), counters doubled by recomputation (torchtitan PR #1593).
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import param
from moe.config import ConfigError, check
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.models.sample import generate, init_cache
from moe.routing.base import LinearRouter
from moe.routing.topk import TopKConfig
from tests import grid, oracle


def small(**changes: Any) -> DecoderConfig:
    return grid.model_config(**changes)


MIXED = small(num_layers=6, dense_layers=1, moe_every=2, mlp_hidden=24)  # d | d m  d m | d
PERIOD = small(num_layers=4, moe_every=2, mlp_hidden=24)  # d m  d m
RHYTHM_UNSET = {"num_layers": 4, "attention": AttentionConfig(), "moe": MoEConfig()}
SHARED = small(moe=MoEConfig(num_experts=8, expert_hidden=16, shared_hidden=12, router=TopKConfig(init_std=0.3)))
CONFIGS = {
    "mixed": MIXED, "shared expert, untied": dataclasses.replace(SHARED, tie_embeddings=False),
    "dense": small(moe=None, mlp_hidden=24), "remat": small(remat="full", num_layers=3),
}  # fmt: skip


def inputs(config: DecoderConfig, sequences: int = 4) -> tuple[Any, Any, Any]:
    """(parameters, context, bias) with a bias that differs by layer."""
    arrays = {name: value[:sequences] for name, value in grid.batch().items()}
    params = jax.jit(lambda: param.pure(config.build(jax.random.key(0))))()
    E = config.moe.num_experts if config.moe else 1
    bias = 0.05 * jax.random.normal(jax.random.key(2), (config.num_moe_layers, E))
    return params, oracle.context_of(arrays), bias


def run(config: DecoderConfig, params: Any, context: Any, bias: Any) -> Any:
    return param.bind(config.abstract(), params)(context, bias)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_scanned_layers_equal_a_python_loop(config: DecoderConfig) -> None:
    params, context, bias = inputs(config)
    logits, stats = jax.jit(lambda *a: run(config, *a))(params, context, bias)
    expected = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a))(params, context, bias)
    grid.close(logits, expected.logits, "logits")
    assert len(expected.statistics) == config.num_moe_layers
    if stats is None:
        assert config.moe is None
        return
    for layer, sums in enumerate(expected.statistics):  # in layer order, each with its own bias
        np.testing.assert_array_equal(stats.count_BE[layer], sums.count_BE)
        np.testing.assert_allclose(stats.prob_BE[layer], sums.prob_BE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [PERIOD, SHARED], ids=["period", "shared"])
def test_no_logit_depends_on_a_later_token_or_another_document(config: DecoderConfig) -> None:
    params, context, bias = inputs(config, sequences=2)
    bound = param.bind(config.abstract(), params)
    x = bound.embed(context.token_BS)

    def logits_at(t: int) -> Any:
        def value(x: jax.Array) -> jax.Array:
            replaced = param.bind(config.abstract(), params)
            replaced.embed = lambda _: x
            return jnp.square(replaced(context, bias)[0][:, t]).sum()

        return jax.jit(jax.grad(value))(x)

    segment = np.asarray(context.segment_BS)
    t = 9
    depends = np.abs(np.asarray(logits_at(t))).max(axis=-1) > 0
    np.testing.assert_array_equal(depends, (segment == segment[:, t : t + 1]) & (np.arange(segment.shape[1]) <= t))


@functools.cache
def loss_and_gradient(remat: Any) -> Any:
    config = dataclasses.replace(PERIOD, remat=remat)
    params, context, bias = inputs(config)

    def loss(params: Any) -> Any:
        logits, stats = run(config, params, context, bias)
        return jnp.sin(logits).mean() + (stats.prob_BE**2).mean(), stats

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_loss_nor_gradient_nor_load(remat: Any) -> None:
    (value, stats), gradient = loss_and_gradient(remat)
    (expected, expected_stats), expected_gradient = loss_and_gradient("none")
    grid.close(value, expected, "loss")
    grid.close_trees(gradient, expected_gradient, "gradient")
    np.testing.assert_array_equal(stats.count_BE, expected_stats.count_BE)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_every_remat_policy_saves_the_choice_of_the_router(remat: Any) -> None:
    """One top-k in forward and backward pass together: recomputation cannot pick other experts."""
    config = small(remat=remat)
    params, context, bias = inputs(config)
    text = str(jax.make_jaxpr(jax.grad(lambda p: run(config, p, context, bias)[0].sum()))(params))
    assert text.count("name=router") >= 2
    assert text.count("top_k") == 1


def lowered(num_layers: int) -> Any:
    config = small(num_layers=num_layers)
    params = jax.eval_shape(lambda: param.pure(config.build(jax.random.key(0))))
    context = oracle.context_of({name: value[:2] for name, value in grid.batch().items()})
    bias = jnp.zeros((num_layers, 8))
    return jax.jit(jax.grad(lambda p: run(config, p, context, bias)[0].sum())).lower(params)


def test_the_program_does_not_grow_with_depth() -> None:
    few, many = lowered(4), lowered(48)
    assert len(many.as_text()) <= 1.05 * len(few.as_text())

    def seconds(program: Any) -> float:  # of this process, whatever else the machine does
        start = time.process_time()
        program.compile()
        return time.process_time() - start

    seconds(few)  # warm up
    assert seconds(many) <= 2.0 * seconds(lowered(5))


def test_calling_a_module_writes_to_none_of_its_variables() -> None:
    params, context, bias = inputs(SHARED)
    model = param.bind(SHARED.abstract(), params)
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    model(context, bias)
    after = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert jax.tree.structure(before) == jax.tree.structure(params), "there is state beside the parameters"


def count(config: DecoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(param.pure(config.abstract())))


def test_the_number_of_parameters_by_hand() -> None:
    V, D, L, E, F, H = 264, 32, 2, 8, 16, 8
    attention = D * 4 * H + 2 * D * 2 * H + 4 * H * D
    moe = D * E + 3 * E * D * F
    layers = L * (attention + moe + 2 * D)
    assert count(small()) == V * D + layers + D
    assert count(small(tie_embeddings=False)) == 2 * V * D + layers + D
    assert count(SHARED) == count(small()) + L * 3 * D * 12
    assert count(small(moe=None, mlp_hidden=24)) == V * D + L * (attention + 3 * D * 24 + 2 * D) + D
    assert count(MIXED) == V * D + 6 * (attention + 2 * D) + 4 * 3 * D * 24 + 2 * moe + D


def test_layers_start_from_different_values_of_the_documented_size() -> None:
    params = param.pure(small(num_layers=4).build(jax.random.key(0)))
    gate = params["stacks"][0][1]["moe"]["w_gate"]
    assert len({gate[layer, expert].tobytes() for layer in range(4) for expert in range(8)}) == 32
    np.testing.assert_allclose(gate.std(), 0.1, rtol=0.03)  # truncated at 3: 0.987 of it
    np.testing.assert_allclose(params["stacks"][0][1]["moe"]["w_down"].std(), 0.1 / np.sqrt(8), rtol=0.03)


def test_bfloat16_keeps_parameters_router_statistics_and_logits_in_float32() -> None:
    config = small(compute_dtype="bfloat16", remat="full")
    params, context, bias = inputs(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, stats = jax.jit(lambda *a: run(config, *a))(params, context, bias)
    assert logits.dtype == stats.prob_BE.dtype == stats.z_B.dtype == jnp.float32
    assert stats.count_BE.dtype == stats.tokens_B.dtype == stats.dropped_B.dtype == jnp.int32
    assert param.bind(config.abstract(), params).embed(context.token_BS).dtype == jnp.bfloat16
    gradient = jax.eval_shape(jax.grad(lambda p: run(config, p, context, bias)[0].sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    exact, _ = jax.jit(lambda *a: run(small(), *a))(params, context, bias)
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.2


def test_the_whole_model_decodes_token_by_token_like_its_forward_pass() -> None:
    params, context, bias = inputs(PERIOD, sequences=2)
    B, S = context.token_BS.shape
    whole = dataclasses.replace(
        context,
        segment_BS=jnp.ones((B, S), jnp.int32),
        position_BS=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S)),
    )
    expected, _ = jax.jit(lambda *a: run(PERIOD, *a))(params, whole, bias)
    model = param.bind(PERIOD.abstract(), params)

    def step(caches: Any, here: Any) -> Any:
        logits, caches = model.decode(here, bias, caches)
        return caches, logits

    def cut(leaf: jax.Array) -> jax.Array:  # [B, S] -> [S, B, 1]
        return leaf.T[..., None]

    names = ("token_BS", "segment_BS", "position_BS", "task_BS")
    pieces = {name: cut(getattr(whole, name)) for name in names}
    read = jax.jit(lambda caches: jax.lax.scan(lambda c, t: step(c, dataclasses.replace(whole, **t)), caches, pieces))
    caches, found = read(init_cache(model, B, S, jnp.float32))
    np.testing.assert_allclose(found.swapaxes(0, 1), expected, atol=1e-4)
    assert caches[0][2].length.tolist() == [S, S]  # of the second attention of the pattern, in both repeats


def test_no_two_sublayers_share_a_random_key() -> None:
    """A router that draws noise sees another key in every layer, the same one however layers are stacked."""
    seen: list[bytes] = []
    base = small()
    layers = (base.attention, base.moe)
    config = small(stacks=(StackConfig(layers=layers, repeats=2), StackConfig(layers=layers)), **RHYTHM_UNSET)

    def spy(self: Any, x: Any, context: Any, bias: Any) -> Any:
        jax.debug.callback(lambda key: seen.append(key.tobytes()), jax.random.key_data(context.key), ordered=True)
        return original(self, x, context, bias)

    original, LinearRouter.__call__ = LinearRouter.__call__, spy  # type: ignore[method-assign]
    try:
        params, context, bias = inputs(config)
        jax.block_until_ready(jax.jit(lambda *a: run(config, *a))(params, context, bias))
        jax.effects_barrier()
        scanned, seen = seen, []
        loop = jax.jit(lambda *a: oracle.unrolled(config.abstract(), *a).logits)  # calls every router twice
        jax.block_until_ready(loop(params, context, bias))
        jax.effects_barrier()
    finally:
        LinearRouter.__call__ = original  # type: ignore[method-assign]
    assert len(scanned) == len(set(scanned)) == config.num_moe_layers
    assert scanned == seen[::2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LooksAheadConfig(TopKConfig):
    causal = False


LOOKS_AHEAD = MoEConfig(router=LooksAheadConfig())


def test_a_router_that_looks_ahead_is_refused_unless_allowed() -> None:
    hint = r" = LooksAheadConfig\(.*\): looks at later tokens; .* model\.allow_non_causal=True$"
    with pytest.raises(ConfigError, match=r"^model\.moe\.router" + hint):
        check(small(moe=LOOKS_AHEAD), "model")
    spelled = DecoderConfig(stacks=(StackConfig(layers=(AttentionConfig(), LOOKS_AHEAD)),))
    with pytest.raises(ConfigError, match=r"^model\.stacks\.0\.layers\.1\.router" + hint):
        check(spelled, "model")
    check(dataclasses.replace(spelled, allow_non_causal=True), "model")
    with pytest.raises(ConfigError, match=r"^model\.allow_non_causal = True: is ignored, as no router looks at later"):
        check(small(allow_non_causal=True), "model")


def test_no_text_is_written_with_a_router_that_looks_ahead() -> None:
    model = small(moe=LOOKS_AHEAD, allow_non_causal=True).abstract()
    options = {"num_tokens": 2, "temperature": 0.0, "top_p": 1.0, "key": jax.random.key(0), "eos": None, "step": 0}
    with pytest.raises(ConfigError, match=r"^model\.moe\.router: looks at later tokens, which do not exist yet"):
        generate(model, None, jnp.zeros((2, 8)), np.zeros((1, 3), np.int32), **options)


def test_configs_that_leave_a_knob_unused_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mlp_hidden = 24: is ignored, as no layer is dense"):
        check(small(mlp_hidden=24))
    with pytest.raises(ConfigError, match=r"mlp_hidden = 0: must be at least 1: 1 of 2 layers are dense"):
        check(small(dense_layers=1))
    with pytest.raises(ConfigError, match=r"moe_every = 3: leaves no MoE layer among num_layers = 2"):
        check(small(moe_every=3, mlp_hidden=8))
    with pytest.raises(ConfigError, match=r"moe.router.num_selected = 9: must be at most num_experts = 8"):
        check(DecoderConfig(moe=MoEConfig(router=TopKConfig(num_selected=9)), attention=AttentionConfig()))
