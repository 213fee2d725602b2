"""The reference configs: parameters by hand, from the published sizes alone, and against the published figures.

Convention: active is everything but the experts that a token does not select; both embeddings count; what predicts the
second next token stands apart.
"""

import functools
from typing import Any

import pytest

from configs import reference
from launch.cli import load_functions
from moe.balance import LoadBalanceConfig, ZLossConfig
from moe.config import check, from_dict, to_dict
from moe.plan import Parameters, count, train_flops_per_token
from moe.train.run import RunConfig

MODELS: dict[str, Any] = load_functions(reference.__file__)
each_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def counted(name: str) -> Parameters:
    return count(MODELS[name]().model)


# For every model (total, active). Layers are attention + norms + router + experts; an expert is three matrices.


def paper_3b() -> tuple[int, int]:
    attention = (
        1024 * 16 * 64 + 2 * 1024 * 4 * 64 + 16 * 64 * 1024 + 2 * 64
    )  # queries, keys and values, out, head norms
    expert = 3 * 1024 * 640
    layer = attention + 2 * 1024 + 1024 * 64 + 4 * expert  # two norms, router, a shared expert of 4 times the width
    rest = 24 * layer + 151_936 * 1024 + 1024  # one embedding, final norm
    return rest + 24 * 64 * expert, rest + 24 * 4 * expert


def paper_15b() -> tuple[int, int]:
    attention = 3072 * 32 * 128 + 2 * 3072 * 4 * 128 + 32 * 128 * 3072 + 2 * 128
    expert = 3 * 3072 * 256
    layer = attention + 2 * 3072 + 3072 * 160 + 4 * expert
    rest = 34 * layer + 2 * 151_936 * 3072 + 3072
    return rest + 34 * 160 * expert, rest + 34 * 4 * expert


def paper_43b() -> tuple[int, int]:
    attention = 4608 * 48 * 128 + 2 * 4608 * 16 * 128 + 48 * 128 * 4608 + 2 * 128
    expert = 3 * 4608 * 384
    layer = attention + 2 * 4608 + 4608 * 160 + 4 * expert
    rest = 44 * layer + 2 * 151_936 * 4608 + 4608
    return rest + 44 * 160 * expert, rest + 44 * 4 * expert


def olmoe_1b_7b() -> tuple[int, int]:
    attention = 4 * 2048 * 2048 + 2 * 2048  # as many key-value heads; norms over whole queries and keys
    expert = 3 * 2048 * 1024
    layer = attention + 2 * 2048 + 2048 * 64
    rest = 16 * layer + 2 * 50_304 * 2048 + 2048
    return rest + 16 * 64 * expert, rest + 16 * 8 * expert


def mixtral_8x7b() -> tuple[int, int]:
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024  # 8 key-value heads of 128
    expert = 3 * 4096 * 14_336
    layer = attention + 2 * 4096 + 4096 * 8
    rest = 32 * layer + 2 * 32_000 * 4096 + 4096
    return rest + 32 * 8 * expert, rest + 32 * 2 * expert


def mixtral_8x22b() -> tuple[int, int]:
    attention = 2 * 6144 * 6144 + 2 * 6144 * 1024
    expert = 3 * 6144 * 16_384
    layer = attention + 2 * 6144 + 6144 * 8
    rest = 56 * layer + 2 * 32_768 * 6144 + 6144
    return rest + 56 * 8 * expert, rest + 56 * 2 * expert


def qwen2_57b() -> tuple[int, int]:
    attention = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512  # 4 key-value heads of 128; biases
    expert, shared = 3 * 3584 * 2560, 3 * 3584 * 20_480 + 3584  # with its own gate
    layer = attention + 2 * 3584 + 3584 * 64 + shared
    rest = 28 * layer + 2 * 151_936 * 3584 + 3584
    return rest + 28 * 64 * expert, rest + 28 * 8 * expert


def qwen3_30b() -> tuple[int, int]:
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128  # 32 and 4 heads of 128; head norms
    expert = 3 * 2048 * 768
    layer = attention + 2 * 2048 + 2048 * 128
    rest = 48 * layer + 2 * 151_936 * 2048 + 2048
    return rest + 48 * 128 * expert, rest + 48 * 8 * expert


def qwen3_235b() -> tuple[int, int]:
    attention = 2 * 4096 * 8192 + 2 * 4096 * 512 + 2 * 128  # 64 and 4 heads of 128; head norms
    expert = 3 * 4096 * 1536
    layer = attention + 2 * 4096 + 4096 * 128
    rest = 94 * layer + 2 * 151_936 * 4096 + 4096
    return rest + 94 * 128 * expert, rest + 94 * 8 * expert


def deepseek_v3_layer(experts: int) -> int:
    """Attention, norms, router, shared expert and so many others."""
    query = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)
    key_value = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    return query + key_value + 128 * 128 * 7168 + 2 * 7168 + 7168 * 256 + (1 + experts) * 3 * 7168 * 2048


def deepseek_v3() -> tuple[int, int]:
    router_and_shared = 7168 * 256 + 3 * 7168 * 2048
    dense = deepseek_v3_layer(0) - router_and_shared + 3 * 7168 * 18_432
    rest = 3 * dense + 2 * 129_280 * 7168 + 7168
    return rest + 58 * deepseek_v3_layer(256), rest + 58 * deepseek_v3_layer(8)


BY_HAND = {
    by_hand.__name__: by_hand
    for by_hand in (
        paper_3b, paper_15b, paper_43b, olmoe_1b_7b, mixtral_8x7b, mixtral_8x22b, qwen2_57b, qwen3_30b, qwen3_235b,
        deepseek_v3,
    )
}  # fmt: skip

# In billions: (total, active) to three digits, and what the model's card or paper says of it.
BILLIONS = {
    "paper_3b": ((3.429, 0.598), (3.4, 0.6)),
    "paper_15b": ((15.068, 2.555), (15, 2.54)),
    "paper_43b": ((43.061, 6.624), (42.8, 6.6)),
    "olmoe_1b_7b": ((6.919, 1.282), (6.9, 1.3)),
    "mixtral_8x7b": ((46.703, 12.880), (46.7, 12.9)),
    "mixtral_8x22b": ((140.630, 39.161), (141, 39)),
    "qwen2_57b": ((57.409, 14.249), (57.4, 14.2)),
    "qwen3_30b": ((30.532, 3.353), (30.5, 3.3)),
    "qwen3_235b": ((235.094, 22.191), (235, 22)),
    "deepseek_v3": ((671.026, 37.552), (671, 37)),
}


@each_model
def test_the_parameters_are_those_counted_by_hand(name: str) -> None:
    assert (counted(name).total, counted(name).active) == BY_HAND[name]()


@each_model
def test_the_parameters_are_those_published(name: str) -> None:
    (total, active), published = BILLIONS[name]
    assert (round(counted(name).total / 1e9, 3), round(counted(name).active / 1e9, 3)) == (total, active)
    # Width and depth of the paper's models are ours, so they have to meet its figures more closely.
    allowed = 0.01 if name.startswith("paper") else 0.02
    assert abs(total / published[0] - 1) < allowed
    assert abs(active / published[1] - 1) < allowed
    assert f"{total:.3f}B and {active:.3f}B" in MODELS[name].__doc__


def test_the_second_next_token_stands_apart() -> None:
    found = counted("deepseek_v3")
    merge = 2 * 7168 * 7168 + 2 * 7168
    assert found.ahead == merge + deepseek_v3_layer(256)
    assert round(found.ahead / 1e9, 3) == 11.610
    assert found.total == found.embedding + found.attention + found.mlp + found.experts + found.other
    assert {name for name in MODELS if counted(name).ahead} == {"deepseek_v3"}
    # Without the input embedding, as its paper may count: 36.626.
    assert round((found.active - 129_280 * 7168) / 1e9, 3) == 36.626


def test_latents_count_as_attention() -> None:
    layer = deepseek_v3_layer(0) - (1536 + 512 + 2 * 7168 + 7168 * 256 + 3 * 7168 * 2048)  # norms, router, shared
    assert counted("deepseek_v3").attention == 61 * layer


@each_model
def test_every_config_is_whole(name: str) -> None:
    config = MODELS[name]()
    assert isinstance(config, RunConfig)
    check(config)
    assert from_dict(to_dict(config)) == config
    assert (config.model.compute_dtype, config.model.remat, config.data.seq_len) == ("bfloat16", "full", 4096)
    assert config.batch_size >= 1024
    assert config.model.tie_embeddings == config.model.scale_embedding == (name == "paper_3b")


def test_balance_coefficients_are_per_layer_and_for_a_loss_of_one() -> None:
    def of(name: str, kind: Any) -> float:
        return next(rule.coefficient for rule in MODELS[name]().balance if isinstance(rule, kind))

    assert of("olmoe_1b_7b", LoadBalanceConfig) == 0.01 / 16  # its code: a mean over the 16 layers
    assert of("olmoe_1b_7b", ZLossConfig) == 0.001 / (16 * 8)  # and over the 8 choices
    assert of("mixtral_8x7b", LoadBalanceConfig) == pytest.approx(0.02 * 2 / 32)
    assert of("qwen3_235b", LoadBalanceConfig) == pytest.approx(0.001 * 8 / 94)
    assert of("deepseek_v3", LoadBalanceConfig) == 1e-4
    assert {of(name, LoadBalanceConfig) for name in MODELS if name.startswith("paper")} == {0.008}


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("olmoe_1b_7b", 7.87), ("mixtral_8x7b", 79.7), ("mixtral_8x22b", 242.2), ("qwen2_57b", 84.7), ("qwen3_30b", 23.0),
     ("qwen3_235b", 148.0)],
)  # fmt: skip
def test_flops_are_those_of_megatrons_formula(name: str, gigaflops: float) -> None:
    found = train_flops_per_token(MODELS[name]().model, 4096) / 1e9
    assert round(found, 2 if name == "olmoe_1b_7b" else 1) == gigaflops


def test_flops_of_deepseek_v3_by_hand() -> None:
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    attention = projections + 128 * (192 + 128) * 4096 // 2
    sparse, dense = 3 * 7168 * 2048 * (8 + 1), 3 * 7168 * 18_432
    ahead = attention + sparse + 2 * 7168 * 7168 + 7168 * 129_280
    expected = 61 * attention + 3 * dense + 58 * sparse + 7168 * 129_280 + ahead
    assert train_flops_per_token(MODELS["deepseek_v3"]().model, 4096) == 6 * expected


def test_every_function_of_the_file_is_a_model_counted_here() -> None:
    assert set(MODELS) == set(BY_HAND) == set(BILLIONS)
