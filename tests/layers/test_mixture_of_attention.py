"""The mixture of attention against dense attention, expert by expert."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import axes, param
from moe.config import ConfigError, check
from moe.kernels.attend import AttendConfig
from moe.layers.attention import AttentionConfig
from moe.layers.mixture_of_attention import MixtureOfAttention, MixtureOfAttentionConfig
from moe.layers.rope import rotate
from tests.layers.sublayers import B, D, S, build, check_contract, cuts, decoded, inputs, one_document, run
from tests.routing.contexts import context_for

ONE = AttentionConfig(num_heads=4, num_kv_heads=2, head_width=6, rope_theta=100.0)
CONFIG = MixtureOfAttentionConfig(num_experts=2, attention=ONE)
SHARED = dataclasses.replace(CONFIG, shared_kv=True)
both = pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["own keys", "shared keys"])


def expert(module: MixtureOfAttention, i: int, x: jax.Array, context: Any) -> jax.Array:
    """Attention expert i by itself, head by head."""
    own = not module.config.shared_kv
    params = param.pure(module)["experts"]
    key, value = (params[name][i] if own else params[name] for name in ("w_key", "w_value"))
    turn = lambda w: rotate(jnp.einsum("bsd,dnh->bsnh", x, w), context.position_BS, ONE.rope_theta)  # noqa: E731
    query, key, value = turn(params["w_query"][i]), turn(key), jnp.einsum("bsd,dnh->bsnh", x, value)
    segment, at = context.segment_BS, jnp.arange(x.shape[1])
    seen = (at[:, None] >= at) & (segment[:, :, None] == segment[:, None, :])
    y = jnp.zeros(x.shape)
    for n in range(ONE.num_heads):
        m = n // (ONE.num_heads // ONE.num_kv_heads)
        scores = jnp.einsum("bsh,bth->bst", query[:, :, n], key[:, :, m]) / ONE.head_width**0.5
        share = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        y += jnp.einsum("bst,bth,hd->bsd", share, value[:, :, m], params["w_out"][i, n])
    return y


@both
def test_it_is_the_mixture_of_its_experts_by_the_softmax_of_the_querying_token(config: Any) -> None:
    module, x, context = build(config), inputs(), context_for(B, S, padding=1)
    share = jax.nn.softmax(x @ module.w_router[...])
    expected = sum(share[..., i, None] * expert(module, i, x, context) for i in range(2))
    np.testing.assert_allclose(run(module, x, context), expected, rtol=1e-4, atol=1e-4)
    assert float(share.std()) > 0.05  # the router has an opinion


@both
def test_identical_experts_are_dense_attention_whatever_the_router_says(config: Any) -> None:
    module, x, context = build(config), inputs(), context_for(B, S)
    same = {"w_query", "w_out"} | (set() if config.shared_kv else {"w_key", "w_value"})
    params = param.pure(module)
    own = params["experts"]
    alike = {name: jnp.broadcast_to(w[:1], w.shape) if name in same else w for name, w in own.items()}
    dense = expert(module, 0, x, context)
    for router in (params["w_router"], 10 * params["w_router"]):
        found = run(param.bind(module, {"experts": alike, "w_router": router}), x, context)
        np.testing.assert_allclose(found, dense, rtol=1e-4, atol=1e-4)


def test_shared_keys_are_the_same_keys_in_every_expert() -> None:
    shared, x = build(SHARED), inputs()
    params = param.pure(shared)
    experts = params["experts"]
    common = {name: jnp.stack([experts[name]] * 2) for name in ("w_key", "w_value")}
    copied = params | {"experts": experts | common}
    np.testing.assert_allclose(run(param.bind(build(CONFIG), copied), x), run(shared, x), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("pieces", [(S,), (1,) * S, (3, 1, 4)])
def test_decoding_in_pieces_equals_the_whole(config: Any, pieces: tuple[int, ...]) -> None:
    module, x = build(config), inputs()[:2]
    whole = run(module, x, one_document(2, S))
    np.testing.assert_allclose(decoded(module, x, pieces, S + 2), whole, rtol=1e-4, atol=1e-4)


@both
def test_head_norms_belong_to_what_they_normalise(config: Any) -> None:
    config = dataclasses.replace(config, attention=dataclasses.replace(ONE, head_norm="qkv"))
    shapes = {name: leaf.shape for name, leaf in _flat(param.pure(build(config))["experts"]).items()}
    own = () if config.shared_kv else (2,)
    assert shapes["query_norm.scale"] == (2, 6)
    assert shapes["key_norm.scale"] == shapes["value_norm.scale"] == (*own, 6)
    x = inputs()[:2]
    whole = run(build(config), x, one_document(2, S))
    np.testing.assert_allclose(decoded(build(config), x, (4, 4), S), whole, rtol=1e-4, atol=1e-4)


def _flat(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_shared_keys_have_one_cache_and_own_keys_one_for_each_expert() -> None:
    own, shared = (build(config).empty_cache(2, 7, jnp.bfloat16) for config in (CONFIG, SHARED))
    assert own.key_BSMH.shape == own.value_BSMH.shape == (2, 2, 7, 2, 6)
    assert shared.key_BSMH.shape == shared.value_BSMH.shape == (2, 7, 2, 6)
    assert own.key_BSMH.dtype == shared.value_BSMH.dtype == jnp.bfloat16


@both
def test_it_keeps_the_contract_of_sublayers(config: Any) -> None:
    check_contract(config)
    of_experts = axes.spec(("experts", "expert_embed", "expert_heads", None))
    assert cuts(build(config))["experts.w_query"] == of_experts
    shared = axes.spec(("embed", "kv_heads", None))
    assert cuts(build(config))["experts.w_key"] == (shared if config.shared_kv else of_experts)


def test_no_token_sees_another_document_or_a_later_token() -> None:
    module, x, context = build(SHARED), np.array(inputs()[:1]), context_for(1, S)
    before = run(module, jnp.asarray(x), context)
    for t in range(S):
        other = x.copy()
        other[0, t] += 1.0
        moved = np.asarray((run(module, jnp.asarray(other), context) != before).any(axis=-1))[0]
        segment = np.asarray(context.segment_BS[0])
        np.testing.assert_array_equal(moved, (segment == segment[t]) & (np.arange(S) >= t))


def test_gains_of_head_norms_are_vectors_so_that_they_do_not_decay() -> None:
    axes = param.logical_axes(build(dataclasses.replace(CONFIG, attention=dataclasses.replace(ONE, head_norm="qkv"))))
    assert all(axes["experts"][name]["scale"] == ("norm",) for name in ("query_norm", "key_norm", "value_norm"))


def test_parameter_counts_are_those_of_the_paper() -> None:
    # Table of arXiv 2408.08274, the small model: D 1024, 6 layers, 8 heads of 128, 256k words (input and output), 4
    # experts, a gated MLP of hidden 2048 (the table's 4096 counts gate and up), 7 norms, a router for each branch.
    D, L, E, V = 1024, 6, 4, 256_000
    mlp, norms, mlp_routers = 3 * D * 2048, 7 * D, L * D * E
    for shared_kv, total in ((False, 776_002_560), (True, 738_253_824)):
        config = MixtureOfAttentionConfig(
            num_experts=E, attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_width=128), shared_kv=shared_kv
        )
        state = nnx.state(jax.eval_shape(lambda c=config: build(c, D)), nnx.Param)
        attention = sum(leaf.size for leaf in jax.tree.leaves(state))
        assert attention == 4 * D * D * E + D * E - (2 * D * D * (E - 1) if shared_kv else 0)
        assert 2 * V * D + L * (attention + E * mlp) + mlp_routers + norms == total
        assert config.active_share == 1.0  # soft routing: attention is active in full
        # The table's active counts leave out one of the two routers, and common keys and values altogether.
        active = 612_400_128 + L * 2 * D * D if shared_kv else 662_731_776
        assert 2 * V * D + L * (attention + mlp) + norms == active


def test_multiply_adds_count_projections_of_all_experts_and_half_the_scores() -> None:
    N, M, H = 4, 2, 6
    queries = 2 * (2 * D * N * H + N * H * S)
    assert CONFIG.multiply_adds(D, S) == queries + 2 * 2 * D * M * H
    assert SHARED.multiply_adds(D, S) == queries + 2 * D * M * H


def test_a_config_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^num_experts = 1: must be at least 2$"):
        check(dataclasses.replace(CONFIG, num_experts=1))
    with pytest.raises(ConfigError, match=r"^attention.num_kv_heads = 3: must divide num_heads = 4$"):
        check(dataclasses.replace(CONFIG, attention=dataclasses.replace(ONE, num_kv_heads=3)))


@both
def test_biases_of_keys_and_values_belong_to_what_they_make(config: Any) -> None:
    biased = dataclasses.replace(config, attention=dataclasses.replace(ONE, qkv_bias=True))
    module, own = build(biased), () if config.shared_kv else (2,)
    experts = param.pure(module)["experts"]
    assert {name: leaf.shape for name, leaf in experts.items() if name.startswith("b_")} == {
        "b_query": (2, 24), "b_key": (*own, 12), "b_value": (*own, 12)
    }  # fmt: skip
    assert len(param.logical_axes(module)["experts"]["b_query"]) == 1  # a vector for weight decay
    np.testing.assert_array_equal(run(module, inputs()), run(build(config), inputs()))  # they start at zero
    moved = param.bind(module, {**param.pure(module), "experts": experts | {"b_value": experts["b_value"] + 1.0}})
    assert not np.allclose(run(moved, inputs()), run(module, inputs()), rtol=1e-2)


def test_keys_can_travel_in_a_ring_while_experts_are_run_side_by_side() -> None:
    attention = dataclasses.replace(ONE, attend=AttendConfig(method="ring", chunk=1))
    check_contract(MixtureOfAttentionConfig(num_experts=2, attention=attention))
