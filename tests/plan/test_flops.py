"""FLOPs of published models as Megatron counts them (GFLOP per token at S = 4096), and a hand count."""

import dataclasses

import jax
import pytest

from moe.config import ConfigError
from moe.plan import peak_flops, train_flops_per_token
from tests.plan.test_parameters import MIXTRAL_8X7B, MIXTRAL_8X22B, QWEN3_30B, TINY


@pytest.mark.parametrize(
    ("config", "gigaflops"),
    [(MIXTRAL_8X7B, 79.7), (MIXTRAL_8X22B, 242.2), (QWEN3_30B, 23.0)],
    ids=["mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b"],
)
def test_published_models(config, gigaflops):
    assert round(train_flops_per_token(config, 4096) / 1e9, 1) == gigaflops


def test_tiny_model_by_hand():
    # Multiply-adds of one token at S = 10. Layers: dense | dense, moe | dense.
    linear = 4 * (6 * 8 + 6 * 4 + 6 * 4 + 8 * 6)
    core = 4 * 2 * (8 * 10 // 2)  # scores and mixing, N H = 8 wide, over 10 / 2 positions on average
    dense = 3 * (3 * 6 * 5)
    routed = 3 * (3 * 6 * 3)  # K = 3 experts of hidden width 3
    shared = 3 * 6 * 7
    logits = 6 * 11
    assert train_flops_per_token(TINY, 10) == 6 * (linear + core + dense + routed + shared + logits)


def test_only_attention_grows_with_the_sequence():
    per_position = train_flops_per_token(TINY, 11) - train_flops_per_token(TINY, 10)
    assert per_position == 6 * 4 * 8
    assert train_flops_per_token(TINY, 110) - train_flops_per_token(TINY, 10) == 100 * per_position


def test_number_of_experts_is_free():
    many = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, num_experts=64))
    assert train_flops_per_token(many, 10) == train_flops_per_token(TINY, 10)


def test_dense_model():
    dense = dataclasses.replace(TINY, moe=None)
    assert train_flops_per_token(dense, 10) == 6 * (4 * 144 + 4 * 80 + 4 * 90 + 66)


def test_bad_sequence_length():
    with pytest.raises(ConfigError, match="seq_len = 0: must be at least 1"):
        train_flops_per_token(TINY, 0)


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),  # of one of its two devices
    ],
)
def test_peaks(device_kind, teraflops):
    assert peak_flops(device_kind) == teraflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""])
def test_unknown_peaks(device_kind):
    assert peak_flops(device_kind) is None


def test_this_machine_has_no_peak():
    assert jax.devices("cpu")[0].device_kind == "cpu"
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None
