"""A sparse MoE language model on the running Python's own standard library, on two CPU cores, in minutes.

python -m launch.train configs/quickstart.py
"""

from moe.axes import MeshConfig
from moe.balance import LoadBalanceConfig, ZLossConfig
from moe.data import DataConfig
from moe.dispatch import DroplessConfig
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.routing.topk import TopKConfig
from moe.train.run import CheckpointConfig, EvaluateConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        seed=0,
        steps=400,
        batch_size=32,
        model=DecoderConfig(
            vocab_size=258,
            width=128,
            num_layers=3,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_width=32),
            moe=MoEConfig(
                num_experts=8,
                expert_hidden=128,
                shared_hidden=128,
                router=TopKConfig(num_selected=2, normalise="sum"),
                dispatch=DroplessConfig(),
            ),
        ),
        balance=(LoadBalanceConfig(coefficient=0.01, scope="global"), ZLossConfig(coefficient=1e-4)),
        data=DataConfig(seq_len=128, domain_weights="equal"),
        optim=AdamWConfig(learning_rate=4e-3, schedule=WarmupCosineConfig(warmup_steps=50)),
        mesh=MeshConfig(),
        checkpoint=CheckpointConfig(every=200),
        evaluate=EvaluateConfig(every=200),
    )
