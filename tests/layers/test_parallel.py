"""Sublayers side by side: the sum of its parts in value, statistics, caches and costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.layers.attention import AttentionConfig
from moe.layers.base import SublayerConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import Parallel, ParallelConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.plan import count, train_flops_per_token
from moe.routing.topk import TopKConfig
from tests.routing.contexts import context_for

B, S, D, E = 2, 6, 16, 4
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_width=8)
EXPERTS = MoEConfig(num_experts=E, expert_hidden=8, router=TopKConfig(init_std=0.3))
CONFIG = ParallelConfig(parts=(ATTENTION, EXPERTS))
BIAS = jnp.array([0.0, 0.5, 0.0, -0.5])


def built(config: ParallelConfig = CONFIG) -> Parallel:
    return config.build(jax.random.key(0), D, 0.4, 0.4)


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, S, D))


def test_the_output_is_the_sum_of_the_parts_and_the_statistics_are_the_routed_ones() -> None:
    module, context = built(), context_for(B, S, padding=1)
    run = jax.jit(lambda x: [part(x, context, BIAS) for part in (module, module.attention, module.moe)])
    (y, stats), (mixed, _), (routed, expected) = run(tokens())
    np.testing.assert_allclose(y, mixed + routed, rtol=1e-6, atol=1e-6)
    assert stats is not None and int(stats.count_BE.sum()) == 2 * B * (S - 1)
    jax.tree.map(np.testing.assert_array_equal, stats, expected)


def test_decoding_in_pieces_equals_the_whole() -> None:
    module = built()
    position = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    whole = dataclasses.replace(context_for(B, S), segment_BS=jnp.ones_like(position), position_BS=position)
    expected, _ = jax.jit(lambda: module(tokens(), whole, BIAS))()
    decode = jax.jit(lambda x, here, cache: module.decode(x, here, BIAS, cache))
    cache, found = module.empty_cache(B, S, jnp.float32), []
    for part in (slice(0, 5), slice(5, 6)):
        names = ("token_BS", "segment_BS", "position_BS", "task_BS")
        here = dataclasses.replace(whole, **{name: getattr(whole, name)[:, part] for name in names})
        y, cache = decode(tokens()[:, part], here, cache)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=1e-5, atol=1e-5)
    assert int(cache[0].length) == S and cache[1] == ()


def test_parameters_lie_under_the_labels_of_the_parts() -> None:
    assert set(param.pure(built())) == {"attention", "moe"}
    twice = built(ParallelConfig(parts=(MLPConfig(hidden=4), ATTENTION, MLPConfig(hidden=6))))
    params = param.pure(twice)
    assert set(params) == {"mlp", "attention", "mlp_1"}
    assert params["mlp"]["w_up"].shape == (D, 4) and params["mlp_1"]["w_up"].shape == (D, 6)
    assert not np.array_equal(params["mlp"]["w_up"], params["mlp_1"]["w_up"][:, :4])


def test_it_costs_what_its_parts_cost() -> None:
    def model(*layers: SublayerConfig) -> DecoderConfig:
        return DecoderConfig(width=D, stacks=(StackConfig(layers=layers, repeats=3),))

    beside, after = model(CONFIG), model(ATTENTION, EXPERTS)
    assert train_flops_per_token(beside, 32) == train_flops_per_token(after, 32)
    norms = 3 * D  # one norm instead of two
    assert count(beside).total == count(after).total - norms
    assert count(beside).active == count(after).active - norms
    assert (CONFIG.routed_experts, CONFIG.active_share, CONFIG.mixes_tokens) == (E, 0.5, True)
    assert ParallelConfig(parts=(MLPConfig(), MLPConfig())).mixes_tokens is False


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((EXPERTS, EXPERTS), r"parts = .*: must hold at most one sublayer that picks experts$"),
        ((ATTENTION,), r"parts = .*: must hold at least two sublayers$"),
        ((ATTENTION, MLPConfig(hidden=0)), r"parts\.1\.hidden = 0: must be at least 1$"),
    ],
)
def test_parts_that_cannot_stand_side_by_side_are_refused(parts: tuple[SublayerConfig, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        check(ParallelConfig(parts=parts))
