"""A router that decides once for all layers: every layer follows it, the task teaches it, text is generated with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.balance import ExpertBiasConfig, LoadBalanceConfig
from moe.config import ConfigError, check
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.models.ahead import AheadConfig
from moe.models.layout import StackConfig
from moe.models.sample import generate
from moe.routing.pregate import PreGateConfig
from moe.train.loss import forward
from tests import grid
from tests.grid import Cut
from tests.oracle import context_of

ROUTER = PreGateConfig(hidden=8, num_heads=2, init_std=0.5)
CONFIG = grid.model_config(router=ROUTER)
BIAS = jnp.zeros((grid.LAYERS, grid.EXPERTS))


def test_every_layer_routes_as_the_one_router_says() -> None:
    model = CONFIG.build(jax.random.key(0))
    context = context_of(grid.batch())
    _, stats = model(dataclasses.replace(context, keep_choices=True), BIAS)
    routing = model.router(model.embed(context.token_BS), context, BIAS[0])
    assert stats is not None and stats.expert_BR is not None
    for layer in range(grid.LAYERS):
        np.testing.assert_array_equal(stats.expert_BR[layer], routing.expert_BR)
    assert [name for name in param.pure(model) if "router" in name] == ["router"]
    assert "router" not in param.pure(model)["stacks"][0][1]["moe"]


def test_a_layer_beside_attention_follows_it_too() -> None:
    assert CONFIG.moe is not None
    beside = ParallelConfig(parts=(CONFIG.attention, CONFIG.moe))
    defaults = {field.name: field.default for field in dataclasses.fields(CONFIG)}
    plain: dict[str, Any] = {name: defaults[name] for name in ("num_layers", "attention", "moe")}
    stacks = (StackConfig(layers=(beside,), repeats=2),)
    model = dataclasses.replace(CONFIG, stacks=stacks, **plain).build(jax.random.key(0))
    context = context_of(grid.batch())
    _, stats = model(context, BIAS)
    routing = model.router(model.embed(context.token_BS), context, BIAS[0])
    counts = (routing.expert_BR[..., None] == jnp.arange(grid.EXPERTS)).sum(axis=1)
    assert stats is not None
    np.testing.assert_array_equal(stats.count_BE, jnp.stack([counts, counts]))


def test_its_selection_scores_are_kept_for_quantile_balancing() -> None:
    model = CONFIG.build(jax.random.key(0))
    context, bias = context_of(grid.batch()), jnp.linspace(-0.2, 0.2, grid.EXPERTS)
    routing = model.router(model.embed(context.token_BS), context, bias)
    assert routing.select_BSE is not None
    added = (routing.select_BSE - routing.probs_BSE)[context.mask_BS]
    np.testing.assert_allclose(added, jnp.broadcast_to(bias, added.shape), atol=1e-6)


def test_the_task_of_all_layers_teaches_it() -> None:
    model = CONFIG.build(jax.random.key(0))
    arrays = {name: jnp.asarray(value) for name, value in grid.batch().items()}

    def loss(params: Any) -> jax.Array:
        found = forward(CONFIG.abstract(), params, arrays, BIAS, step=jnp.int32(0), key=jax.random.key(0), train=True)
        return jnp.sin(param.bind(CONFIG.abstract(), params).logits(found.hidden_BSD)).mean()

    gradient = jax.jit(jax.grad(loss))(param.pure(model))["router"]
    assert all(float(jnp.abs(leaf).max()) > 1e-7 for leaf in jax.tree.leaves(gradient))


def test_a_cut_of_the_batch_changes_nothing() -> None:
    rules = (LoadBalanceConfig(name="global"), ExpertBiasConfig(name="sign", rate=0.01))
    mesh = (("fsdp", 4), ("tensor", 2), ("expert", 2), ("expert_tensor", 2))
    cut = Cut(mesh=mesh, accumulation=2, remat="full", padding="tokens", router=ROUTER)
    grid.agree(grid.measure(cut, rules), grid.measure(Cut(router=ROUTER), rules))


def test_generating_with_caches_routes_as_reading_the_whole() -> None:
    model = CONFIG.build(jax.random.key(0))
    prompt = np.random.default_rng(1).integers(0, grid.VOCAB, (2, 5)).astype(np.int32)
    options: dict[str, Any] = {"num_tokens": 5, "temperature": 0.0, "top_p": 1.0, "key": jax.random.key(0), "eos": None}
    found = np.asarray(generate(CONFIG.abstract(), param.pure(model), BIAS, prompt, step=0, **options))
    tokens = np.concatenate([prompt, np.zeros((2, 5), np.int32)], axis=1)
    ones = np.ones_like(tokens)
    for end in range(5, 10):
        arrays = {
            "tokens": tokens, "segment_ids": ones, "domains": 0 * ones,
            "positions": np.broadcast_to(np.arange(10), ones.shape),
        }  # fmt: skip
        whole = {name: np.pad(value, ((0, 0), (0, 1))) for name, value in arrays.items()}
        tokens[:, end] = np.asarray(model(context_of(whole, train=False), BIAS)[0])[:, end - 1].argmax(axis=-1)
    np.testing.assert_array_equal(found, tokens[:, 5:])


def test_two_different_deciders_or_tokens_further_ahead_are_refused() -> None:
    attention, one = AttentionConfig(), MoEConfig(router=ROUTER)
    other = MoEConfig(router=dataclasses.replace(ROUTER, num_selected=3))
    stacks = tuple(StackConfig(layers=(attention, moe)) for moe in (one, other))
    with pytest.raises(ConfigError, match=r"stacks.1.layers.1.router = .*: must be stacks.0.layers.1.router"):
        check(grid.model_config(attention=AttentionConfig(), moe=MoEConfig(), num_layers=4, stacks=stacks))
    with pytest.raises(ConfigError, match=r"ahead = .*: must be None with moe.router"):
        check(grid.model_config(router=ROUTER, ahead=AheadConfig()))
