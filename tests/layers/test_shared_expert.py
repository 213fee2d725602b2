"""How the shared expert joins the routed ones, how experts start, and what finer experts cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import param
from moe.config import ConfigError, check
from moe.dispatch import DenseConfig
from moe.layers.attention import AttentionConfig
from moe.layers.mlp import MLP
from moe.layers.moe import MoE, MoEConfig
from moe.models import DecoderConfig
from moe.plan.flops import train_flops_per_token
from moe.plan.parameters import count
from moe.routing.base import Context, LinearRouterConfig, Routing
from moe.routing.choice import token_choice
from moe.routing.topk import TopKConfig
from tests.routing.contexts import context_for

B, S, D, E, F = 2, 5, 6, 4, 8
CONFIG = MoEConfig(
    num_experts=E, expert_hidden=F, shared_hidden=8, router=TopKConfig(num_selected=1), dispatch=DenseConfig()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllConfig(LinearRouterConfig):
    """Every expert, each with score 1."""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        expert_BSK = jnp.broadcast_to(jnp.arange(logits_BSE.shape[-1]), logits_BSE.shape)
        uniform = jnp.full(logits_BSE.shape, 1 / logits_BSE.shape[-1])
        zero_BS = logits_BSE[..., 0] * 0
        return token_choice(
            context, expert_BSK=expert_BSK, weight_BSK=jnp.ones(logits_BSE.shape), probs_BSE=uniform, log_z_BS=zero_BS,
            margin_BS=zero_BS,
        )  # fmt: skip


def layer(combine: str = "add", **changes: Any) -> MoE:
    config: Any = dataclasses.replace(CONFIG, **({"shared_combine": combine} | changes))
    return config.build(jax.random.key(0), D, 0.5, 0.5)


def inputs(shape: tuple[int, ...] = (B, S, D), dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def run(module: MoE, x: jax.Array) -> jax.Array:
    graph, state = nnx.split(module)
    bias = jnp.zeros(module.w_gate.get_value().shape[0])
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x, context_for(*x.shape[:2]), bias)[0])(state, x)


def with_weights(module: MoE, **changes: jax.Array) -> MoE:
    return param.bind(module, param.pure(module) | changes)


def branches(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(routed, shared) of the layer's weights, each by itself."""
    module = layer()
    assert module.shared is not None
    shared = module.shared(x)
    return run(module, x) - shared, shared


def test_at_equal_logits_softmax_halves_both_branches_and_sigmoid_the_shared_one() -> None:
    x = inputs()
    routed, shared = branches(x)
    np.testing.assert_allclose(run(layer("softmax"), x), routed / 2 + shared / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(layer("sigmoid"), x), routed + shared / 2, rtol=1e-5, atol=1e-5)


def test_the_learned_weights_are_those_of_the_token() -> None:
    x = inputs()
    routed, shared = branches(x)
    w = jax.random.normal(jax.random.key(2), (D, 2))
    one = 1 / (1 + np.exp(-x @ w[:, :1]))
    found = run(with_weights(layer("sigmoid"), w_combine=w[:, :1]), x)
    np.testing.assert_allclose(found, routed + one * shared, rtol=1e-4, atol=1e-4)
    first = 1 / (1 + np.exp(x @ (w[:, 1:] - w[:, :1])))  # softmax over two, of the first
    found = run(with_weights(layer("softmax"), w_combine=w), x)
    np.testing.assert_allclose(found, first * routed + (1 - first) * shared, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("combine", "share"), [("add", 1.0), ("sigmoid", 0.5), ("softmax", 0.5)])
def test_with_experts_of_zero_the_layer_is_its_dense_branch(combine: str, share: float) -> None:
    x = inputs()
    silent = with_weights(layer(combine), w_down=jnp.zeros((E, F, D)))
    np.testing.assert_allclose(run(silent, x), share * branches(x)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["add", "sigmoid", "softmax"])
def test_every_parameter_learns_from_the_first_step(combine: str) -> None:
    module, x = layer(combine), inputs()

    def loss(params: Any) -> jax.Array:
        return jnp.square(param.bind(module, params)(x, context_for(B, S), jnp.zeros(E))[0]).sum()

    gradient = jax.jit(jax.grad(loss))(param.pure(module))
    assert ("w_combine" in gradient) == (combine != "add")
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    if combine == "softmax":  # logits matter by their difference alone
        np.testing.assert_allclose(gradient["w_combine"].sum(axis=1), np.zeros(D), atol=1e-4)
    low = run(module, inputs(dtype=jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


def test_a_combination_without_a_shared_expert_is_refused() -> None:
    for combine in ("sigmoid", "softmax"):
        with pytest.raises(ConfigError, match=rf"^shared_combine = '{combine}': is ignored without a shared expert"):
            check(dataclasses.replace(CONFIG, shared_hidden=0, shared_combine=combine))  # type: ignore[arg-type]


def everything(width: int, hidden: int, expert_init: str, out_std: float) -> MoE:
    """All of 16 experts for every token, each with score 1."""
    config: Any = MoEConfig(
        num_experts=16, expert_hidden=hidden, router=AllConfig(num_selected=16), dispatch=DenseConfig(),
        expert_init=expert_init,  # type: ignore[arg-type]
    )  # fmt: skip
    return config.build(jax.random.key(1), width, 0.02, out_std)


def test_all_experts_with_score_one_are_a_dense_layer_of_as_many_hidden_units() -> None:
    module, x = everything(D, 3, "dense_equivalent", 0.02), inputs()
    w = param.pure(module)
    columns = lambda name: w[name].transpose(1, 0, 2).reshape(D, 48)  # noqa: E731
    whole = {"w_gate": columns("w_gate"), "w_up": columns("w_up"), "w_down": w["w_down"].reshape(48, D)}
    dense = param.bind(MLP(jax.random.key(0), D, 48, 1.0, 1.0), whole)
    np.testing.assert_allclose(run(module, x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 8])
def test_dense_equivalent_experts_start_with_the_variance_of_a_dense_relu_layer(layers: int) -> None:
    width, hidden = 64, 32
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 128, width))
    first = rng.normal(size=(width, 16 * hidden)) * (2 / (layers * width)) ** 0.5
    second = rng.normal(size=(16 * hidden, width)) * (2 / (layers * 16 * hidden)) ** 0.5
    dense = np.maximum(x @ first, 0) @ second
    found = run(everything(width, hidden, "dense_equivalent", 0.02 / (2 * layers) ** 0.5), jnp.asarray(x, jnp.float32))
    # Truncation takes 1 - 0.987^6 = 8 percent off; a fan-in of one expert's F would make the ratio 16.
    assert 0.75 < float(jnp.var(found)) / dense.var() < 1.15


def test_standard_experts_start_with_the_given_standard_deviations() -> None:
    w = param.pure(everything(64, 32, "standard", 0.005))
    for name, std in (("w_gate", 0.02), ("w_up", 0.02), ("w_down", 0.005)):
        assert abs(float(w[name].std()) / std - 0.987) < 0.02, name


def test_experts_m_times_finer_and_more_cost_the_same() -> None:
    def model(m: int) -> DecoderConfig:
        moe = MoEConfig(num_experts=8 * m, expert_hidden=32 // m, router=TopKConfig(num_selected=2 * m))
        return DecoderConfig(width=16, num_layers=2, moe=moe, attention=AttentionConfig(num_heads=2, num_kv_heads=2))

    coarse, fine = count(model(1)), count(model(4))
    assert fine.experts == coarse.experts == 2 * 8 * 3 * 16 * 32
    assert train_flops_per_token(model(4), 64) == train_flops_per_token(model(1), 64)
    routers = 2 * 16 * 8  # the one thing that grows: a column for every expert
    assert fine.total - 4 * routers == coarse.total - routers
    assert fine.active - 4 * routers == coarse.active - routers
