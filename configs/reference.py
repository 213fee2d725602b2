"""Published sparse models, whole: `configs/reference.py:olmoe_1b_7b` and so on. They need a pod; counting, planning and
compiling them needs a laptop.

Sizes are those of the published configurations, so total and active parameters are exact (`moe.plan.count`). What is
not published (said in each function) is a usual choice: AdamW 0.9, 0.95, decay 0.1, clipping at 1, warm-up and cosine.
All of them train on 4096 positions in bfloat16 with full rematerialisation, and with 1024 sequences a step or more.

Text and tokenizer are placeholders that need no network: files below `--data.source.path`, byte by byte. The models'
own tokenizers are theirs to distribute; put one in with `tokenizer=HuggingFaceConfig(path="tokenizer.json")`.

Everywhere differs from the releases: matrices that write into the residual stream start smaller, by the root of the
number of sublayers; norms, biases and nothing else are free of weight decay. The layouts are for TPU v5p, or as said.
"""

import dataclasses
from typing import Any

from moe.axes import MeshConfig
from moe.balance import BalanceRule, ExpertBiasConfig, LoadBalanceConfig, ZLossConfig
from moe.balance.conventions import to_ours
from moe.data import DataConfig, FolderConfig
from moe.dispatch import AllToAllConfig
from moe.kernels.attend import AttendConfig
from moe.layers.attention import AttentionConfig
from moe.layers.latent_attention import LatentAttentionConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.rope import YarnConfig
from moe.models import DecoderConfig
from moe.models.ahead import AheadConfig
from moe.models.layout import StackConfig
from moe.optim import AdamWConfig, ScheduleConfig, WarmupCosineConfig, WarmupStableDecayConfig
from moe.routing.topk import TopKConfig
from moe.train.run import CheckpointConfig, EvaluateConfig, RunConfig

SEQ_LEN = 4096
TOPOLOGIES = {
    "paper_3b": "v5p:2x2x2",
    "paper_15b": "v5p:2x4x4",
    "paper_43b": "v5p:4x4x4",
    "olmoe_1b_7b": "v5e:8x8",
    "mixtral_8x7b": "v5p:4x4x8",
    "mixtral_8x22b": "v5p:4x4x8",
    "qwen2_57b": "v5p:4x4x4",
    "qwen3_30b": "v5p:4x4x4",
    "qwen3_235b": "v5p:8x8x8",
    "deepseek_v3": "v5p:8x8x16",
}
"""The pods that layouts were made for and compiled on: `python -m launch.pods`."""

EXCHANGE = AllToAllConfig(budget=1.5)
"""Rows to experts in buffers of half as much again as is balanced; what does not fit is dropped and counted."""
ATTEND = AttendConfig(method="gather")
LOGIT_CHUNK = 1024


def paper_3b() -> RunConfig:
    """3.4B-A0.6B of the global-batch paper: 64 experts, 4 a token and a shared one of 4 times their width.

    Width, depth, heads and vocabulary are not published: these give 3.429B and 0.598B, within 1 % of 3.4 and 0.6.
    Embeddings are tied: with two of this vocabulary the model would have to be 512 wide. 400B tokens. On v5p:2x2x2:
    11.60 GiB a device as compiled, 11.79 predicted; a step of 13.27 s predicted.
    """
    model = _decoder(
        151_936, 1024, 24, _heads(16, 4, 64, head_norm="qk"), _experts(64, 640, TopKConfig(num_selected=4), shared=2560)
    )
    model = dataclasses.replace(model, tie_embeddings=True, scale_embedding=True)
    return _run(
        model, _paper_balance(), _adamw(1e-3), steps=100_000, mesh=MeshConfig(fsdp=8, expert=8), accumulation=32
    )


def paper_15b() -> RunConfig:
    """15B-A2.54B of the global-batch paper: 160 experts, 4 a token and a shared one of 4 times their width.

    Width, depth, heads and vocabulary are not published: these give 15.068B and 2.555B, within 1 % of 15 and 2.54. 400B
    tokens. On v5p:2x4x4: 15.46 GiB a device as compiled, 15.55 predicted; a step of 12.19 s predicted.
    """
    attention = _heads(32, 4, 128, head_norm="qk")
    model = _decoder(151_936, 3072, 34, attention, _experts(160, 256, TopKConfig(num_selected=4), shared=1024))
    mesh = MeshConfig(fsdp=32, expert=16)
    return _run(model, _paper_balance(), _adamw(6e-4), steps=100_000, mesh=mesh, accumulation=16)


def paper_43b() -> RunConfig:
    """43B-A6.6B of the global-batch paper: 160 experts, 4 a token and a shared one of 4 times their width.

    Width, depth, heads and vocabulary are not published: these give 43.061B and 6.624B, within 1 % of 42.8 and 6.6.
    120B tokens; the paper took 60 000 steps of 512 sequences. Its second, sequence-level term from step 20 000 is left
    out. On v5p:4x4x4: 23.47 GiB a device as compiled, 23.45 predicted; a step of 15.85 s predicted.
    """
    attention = _heads(48, 16, 128, head_norm="qk")
    model = _decoder(151_936, 4608, 44, attention, _experts(160, 384, TopKConfig(num_selected=4), shared=1536))
    return _run(
        model, _paper_balance(), _adamw(4e-4), steps=30_000, mesh=MeshConfig(fsdp=64, expert=32), accumulation=8
    )


def olmoe_1b_7b() -> RunConfig:
    """OLMoE-1B-7B-0924, 6.919B and 1.282B: 64 experts, 8 a token, norms over whole queries and keys.

    Recipe as released: 5.1T tokens, batches of 1024; balance coefficients converted from its code, load counted over
    the 4 sequences of a GPU. Differs: initial weights are cut off at 3 standard deviations there too, but equal for all
    matrices; there norms decay too; its annealing phase is a run of its own. On v5e:8x8: 5.11 GiB a device as compiled,
    5.29 predicted; a step of 11.29 s predicted.
    """
    attention = _heads(16, 16, 128, rope_theta=1e4, head_norm="qk_whole", norm_eps=1e-5)
    model = _decoder(50_304, 2048, 16, attention, _experts(64, 1024, TopKConfig(num_selected=8)), norm_eps=1e-5)
    balance = (
        LoadBalanceConfig(coefficient=to_ours("olmoe", 0.01, num_selected=8, num_layers=16), scope=4),
        ZLossConfig(coefficient=to_ours("olmoe_z", 0.001, num_selected=8, num_layers=16)),
    )
    optim = _adamw(4e-4, WarmupCosineConfig(warmup_steps=2500, final_fraction=0.1))
    return _run(model, balance, optim, steps=1_192_093, mesh=MeshConfig(fsdp=64, expert=16), accumulation=8)


def mixtral_8x7b() -> RunConfig:
    """Mixtral 8x7B, 46.703B and 12.880B: 8 experts, 2 a token, their weights a softmax over the two.

    Its training is not published: the balance coefficient is that of its released configuration, the rest is usual. On
    v5p:4x4x8: 10.59 GiB a device as compiled, 11.06 predicted; a step of 19.49 s predicted.
    """
    return _mixtral(_decoder(32_000, 4096, 32, _heads(32, 8, 128), _mixtral_experts(14_336), norm_eps=1e-5), 0.02)


def mixtral_8x22b() -> RunConfig:
    """Mixtral 8x22B, 140.630B and 39.161B: as 8x7B, 56 layers of width 6144. Its training is not published.

    On v5p:4x4x8: 28.14 GiB a device as compiled, 28.81 predicted; a step of 58.84 s predicted.
    """
    return _mixtral(_decoder(32_768, 6144, 56, _heads(48, 8, 128), _mixtral_experts(16_384), norm_eps=1e-5), 0.001)


def qwen2_57b() -> RunConfig:
    """Qwen2-57B-A14B, 57.409B and 14.249B: 64 experts, 8 a token, and a shared one under a sigmoid of its own.

    Its training is not published (it started from a dense model): the balance coefficient is that of its released code.
    On v5p:4x4x4: 26.64 GiB a device as compiled, 27.87 predicted; a step of 36.29 s predicted.
    """
    experts = _experts(64, 2560, TopKConfig(num_selected=8), shared=20_480, shared_combine="sigmoid")
    model = _decoder(151_936, 3584, 28, _heads(28, 4, 128, qkv_bias=True), experts)
    ours = to_ours("hf", 0.001, num_selected=8, num_layers=28)
    balance = (LoadBalanceConfig(coefficient=ours, accumulation="buffer"),)
    mesh = MeshConfig(fsdp=64, expert=8)
    return _run(model, balance, _adamw(3e-4), steps=100_000, mesh=mesh, accumulation=8)


def qwen3_30b() -> RunConfig:
    """Qwen3-30B-A3B, 30.532B and 3.353B: 128 experts, 8 a token, norms on the heads of queries and keys.

    Global-batch load-balance loss as published; the coefficient is that of the released code, the rest is usual. On
    v5p:4x4x4: 13.42 GiB a device as compiled, 13.37 predicted; a step of 10.97 s predicted.
    """
    return _qwen3(_decoder(151_936, 2048, 48, _heads(32, 4, 128, head_norm="qk"), _qwen3_experts(768)), fsdp=64)


def qwen3_235b() -> RunConfig:
    """Qwen3-235B-A22B, 235.094B and 22.191B: as 30B-A3B, 94 layers of width 4096.

    On v5p:8x8x8: 18.38 GiB a device as compiled, 18.19 predicted; a step of 10.39 s predicted.
    """
    return _qwen3(_decoder(151_936, 4096, 94, _heads(64, 4, 128, head_norm="qk"), _qwen3_experts(1536)), fsdp=512)


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3, 671.026B and 37.552B, and 11.610B that predict the second next token: latent attention, 3 dense
    layers, then 256 experts, 8 a token from 4 of 8 groups, and a shared one; expert bias.

    Recipe as published for 14.8T tokens, but: the batch does not grow from 3072 sequences, the learning rate falls
    linearly over the last third, the bias moves to the end, and the weight of the second next token stays 0.3. Rotary
    positions have YaRN's factor 40, as in the released configuration; it was pre-trained on 4096 positions without. On
    v5p:8x8x16: 23.54 GiB a device as compiled, 24.27 predicted; a step of 130.52 s predicted.
    """
    attention = LatentAttentionConfig(
        num_heads=128, query_latent=1536, key_value_latent=512, head_width=128, rope_width=64, value_width=128,
        rope=YarnConfig(factor=40.0, original_length=4096, interleaved=True), attend=ATTEND,
    )  # fmt: skip
    router = TopKConfig(
        score="sigmoid", num_selected=8, normalise="sum", scale=2.5, num_groups=8, num_groups_selected=4
    )
    dense = StackConfig(layers=(attention, MLPConfig(hidden=18_432)), repeats=3)
    sparse = StackConfig(layers=(attention, _experts(256, 2048, router, shared=2048)), repeats=58)
    model = DecoderConfig(
        vocab_size=129_280, width=7168, stacks=(dense, sparse), ahead=AheadConfig(depth=1, coefficient=0.3),
        tie_embeddings=False, scale_embedding=False, compute_dtype="bfloat16", remat="full", logit_chunk=LOGIT_CHUNK,
        init_std=0.006,
    )  # fmt: skip
    balance = (ExpertBiasConfig(rate=1e-3), LoadBalanceConfig(coefficient=1e-4, scope="sequence"))
    optim = _adamw(2.2e-4, WarmupStableDecayConfig(warmup_steps=2000, decay_steps=76_000, final_fraction=0.1))
    mesh = MeshConfig(fsdp=256, tensor=4, expert=64)
    return _run(model, balance, optim, steps=235_000, mesh=mesh, batch_size=15_360, accumulation=15)


def _decoder(
    vocab_size: int, width: int, num_layers: int, attention: AttentionConfig, moe: MoEConfig, *, norm_eps: float = 1e-6
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size, width=width, num_layers=num_layers, attention=attention, moe=moe, norm_eps=norm_eps,
        tie_embeddings=False, scale_embedding=False, compute_dtype="bfloat16", remat="full", logit_chunk=LOGIT_CHUNK,
    )  # fmt: skip


def _heads(
    num_heads: int, num_kv_heads: int, head_width: int, *, rope_theta: float = 1e6, **fields: Any
) -> AttentionConfig:
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        rope_theta=rope_theta,
        attend=ATTEND,
        **fields,
    )


def _experts(num_experts: int, hidden: int, router: TopKConfig, *, shared: int = 0, **fields: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts, expert_hidden=hidden, router=router, shared_hidden=shared, exchange=EXCHANGE, **fields
    )


def _mixtral_experts(hidden: int) -> MoEConfig:
    return _experts(8, hidden, TopKConfig(num_selected=2, normalise="softmax"))


def _qwen3_experts(hidden: int) -> MoEConfig:
    return _experts(128, hidden, TopKConfig(num_selected=8, normalise="sum"))


def _paper_balance() -> tuple[BalanceRule, ...]:
    # The paper's code is not public: 0.008 is taken to be per layer and to weigh a loss of 1 at balance. The z-loss is
    # said to be on; 0.001 is that of ST-MoE, which the paper follows.
    return LoadBalanceConfig(coefficient=0.008, accumulation="buffer"), ZLossConfig(coefficient=1e-3)


def _adamw(learning_rate: float, schedule: ScheduleConfig | None = None) -> AdamWConfig:
    return AdamWConfig(learning_rate=learning_rate, schedule=schedule or WarmupCosineConfig(warmup_steps=2000))


def _mixtral(model: DecoderConfig, coefficient: float) -> RunConfig:
    ours = to_ours("hf", coefficient, num_selected=2, num_layers=model.num_layers)
    mesh = MeshConfig(fsdp=128, expert=8)
    balance = (LoadBalanceConfig(coefficient=ours, accumulation="buffer"),)
    return _run(model, balance, _adamw(3e-4), steps=100_000, mesh=mesh, accumulation=8)


def _qwen3(model: DecoderConfig, fsdp: int) -> RunConfig:
    ours = to_ours("hf", 0.001, num_selected=8, num_layers=model.num_layers)
    mesh = MeshConfig(fsdp=fsdp, expert=32)
    balance = (LoadBalanceConfig(coefficient=ours, accumulation="buffer"),)
    return _run(model, balance, _adamw(3e-4), steps=100_000, mesh=mesh, accumulation=1024 // fsdp)


def _run(
    model: DecoderConfig, balance: tuple[BalanceRule, ...], optim: AdamWConfig, *, steps: int, mesh: MeshConfig,
    batch_size: int = 1024, accumulation: int = 1,
) -> RunConfig:  # fmt: skip
    return RunConfig(
        steps=steps, batch_size=batch_size, accumulation=accumulation, model=model, balance=balance, optim=optim,
        data=DataConfig(source=FolderConfig(path="text"), seq_len=SEQ_LEN), mesh=mesh,
        checkpoint=CheckpointConfig(every=1000, keep_best=0), evaluate=EvaluateConfig(every=1000),
    )  # fmt: skip
