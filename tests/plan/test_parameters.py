"""Counts of published models, from shapes alone, and of a model small enough to count by hand."""

import dataclasses

import jax
import pytest

from moe import param
from moe.layers.attention import AttentionConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.plan import count
from moe.routing.topk import TopKConfig


def decoder(layers, width, heads, kv_heads, experts, hidden, selected, vocab):
    return DecoderConfig(
        vocab_size=vocab, width=width, num_layers=layers, tie_embeddings=False,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_width=128),
        moe=MoEConfig(num_experts=experts, expert_hidden=hidden, router=TopKConfig(num_selected=selected)),
    )  # fmt: skip


MIXTRAL_8X7B = decoder(32, 4096, 32, 8, 8, 14336, 2, 32000)
MIXTRAL_8X22B = decoder(56, 6144, 48, 8, 8, 16384, 2, 32768)
QWEN3_30B = decoder(48, 2048, 32, 4, 128, 768, 8, 151936)

TINY = DecoderConfig(
    vocab_size=11, width=6, num_layers=4, dense_layers=1, moe_every=2, mlp_hidden=5,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_width=2),
    moe=MoEConfig(num_experts=8, expert_hidden=3, shared_hidden=7, router=TopKConfig(num_selected=3)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (MIXTRAL_8X7B, 46.703, 12.880),
        (MIXTRAL_8X22B, 140.630, 39.161),
        # The model card's 30.532 / 3.353, less its query and key norms: 48 layers * 2 * 128 = 0.00001.
        (QWEN3_30B, 30.532, 3.353),
    ],
    ids=["mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b"],
)
def test_published_models(config, total, active):
    found = count(config)
    assert (round(found.total / 1e9, 3), round(found.active / 1e9, 3)) == (total, active)


def test_tiny_model_by_hand():
    # Layers: dense | dense, moe | dense.
    found = count(TINY)
    assert found.embedding == 11 * 6  # tied: once
    assert found.attention == 4 * (6 * 8 + 2 * 6 * 4 + 8 * 6)
    assert found.mlp == 3 * (3 * 6 * 5) + 3 * 6 * 7  # three dense layers, one shared expert
    assert found.experts == 8 * 3 * 6 * 3
    assert found.other == 6 * 8 + (2 * 4 + 1) * 6  # router; two norms a layer and the last one
    assert found.total == 66 + 4 * 144 + 396 + 432 + 102
    assert found.active == found.total - 5 * 3 * 6 * 3


def test_parts_add_up_to_the_parameters_a_run_trains():
    for config in (TINY, dataclasses.replace(TINY, tie_embeddings=False), dataclasses.replace(TINY, moe=None)):
        found = count(config)
        leaves = jax.tree.leaves(jax.eval_shape(lambda config=config: param.pure(config.build(jax.random.key(0)))))
        assert found.total == sum(leaf.size for leaf in leaves)
        assert found.total == found.embedding + found.attention + found.mlp + found.experts + found.other


def test_dense_model_is_all_active():
    found = count(dataclasses.replace(TINY, moe=None))
    assert found.experts == 0
    assert found.active == found.total


def test_a_residual_pyramid_by_its_formula():
    """PR-MoE-32/64 beside 350M (arXiv 2201.05596): every other of 24 layers has top-1 experts beside a dense branch, 10
    of these 32 experts and the last 2 of them 64. Three matrices of hidden width 2731 stand for its two of 4096."""
    D, F, A = 1024, 2731, AttentionConfig(num_heads=16, num_kv_heads=16, head_width=64)

    def stack(E, repeats):
        moe = MoEConfig(num_experts=E, expert_hidden=F, shared_hidden=F, router=TopKConfig(num_selected=1))
        return StackConfig(layers=(A, MLPConfig(hidden=F), A, moe), repeats=repeats)

    config = DecoderConfig(vocab_size=50257, width=D, stacks=(stack(32, 10), stack(64, 2)))
    found = count(config)
    assert config.num_experts_L == (32,) * 10 + (64,) * 2
    assert found.experts == (10 * 32 + 2 * 64) * 3 * D * F
    assert found.mlp == (12 + 12) * 3 * D * F  # dense layers and dense branches
    assert found.other == (10 * 32 + 2 * 64) * D + (2 * 24 + 1) * D  # routers and norms
    assert found.active == found.total - (10 * 31 + 2 * 63) * 3 * D * F
    assert round(found.total / 1e9) == 4  # the paper's table
    leaves = jax.tree.leaves(jax.eval_shape(lambda: param.pure(config.build(jax.random.key(0)))))
    assert found.total == sum(leaf.size for leaf in leaves)
