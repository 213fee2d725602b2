"""The smallest run that exercises everything: seconds on a laptop, for tests and for trying a change.

python -m launch.train configs/debug.py
python -m launch.train configs/debug.py:folder --data.source.path DIR
"""

import dataclasses

from moe.balance import ExpertBiasConfig, LoadBalanceConfig, ZLossConfig
from moe.data import DataConfig, FolderConfig, StdlibConfig
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.routing.topk import TopKConfig
from moe.train.run import CheckpointConfig, EvaluateConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        steps=20,
        batch_size=8,
        accumulation=2,
        model=DecoderConfig(
            vocab_size=264,
            width=32,
            num_layers=3,
            dense_layers=1,
            mlp_hidden=64,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_width=8),
            moe=MoEConfig(
                num_experts=8,
                expert_hidden=32,
                shared_hidden=32,
                router=TopKConfig(num_selected=2, normalise="sum"),
            ),
        ),
        balance=(LoadBalanceConfig(), ZLossConfig(), ExpertBiasConfig()),
        data=DataConfig(source=StdlibConfig(domains=("english", "headers")), seq_len=64),
        optim=AdamWConfig(schedule=WarmupCosineConfig(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=5),
        evaluate=EvaluateConfig(every=10, max_bytes=2048, final_max_bytes=4096),
    )


def folder() -> RunConfig:
    """The same on a folder of text files."""
    config = get_config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=FolderConfig(path="text")))
