"""Every router once, on one small run: the quickstart's model and text, 300 steps of 16 sequences of 128 bytes.

    python -m launch.train configs/routers.py:top_k
    python -m launch.sweep configs/sweeps/routers.py --workdir runs/routers

All have 3 layers, a shared expert of width 128 and experts of width 128, 2 of 8 for a token; a router that takes one
has 4 of width 256. Balance rules are those of the router's own paper where it has any. Results, with two seeds:
docs/results/routers.md.
"""

import dataclasses
from typing import Any

from configs import quickstart
from moe.balance import BalanceRule, EntropyConfig, ExpertBiasConfig, LoadBalanceConfig, ZLossConfig
from moe.dispatch import CapacityConfig
from moe.routing.activation_gate import ActivationGateConfig
from moe.routing.base import RouterConfig
from moe.routing.dense_to_sparse import DenseToSparseConfig
from moe.routing.expert_choice import ExpertChoiceConfig
from moe.routing.hashed import HashConfig
from moe.routing.pregate import PreGateConfig
from moe.routing.product_key import ProductKeyConfig
from moe.routing.random_choice import RandomConfig
from moe.routing.round_robin import RoundRobinConfig
from moe.routing.sigma import SigmaConfig
from moe.routing.soft import SoftConfig
from moe.routing.soft_moe import SoftMoEConfig
from moe.routing.static_task import StaticTaskConfig
from moe.routing.switch import SwitchConfig
from moe.routing.temperature import TemperatureConfig
from moe.routing.topk import TopKConfig
from moe.routing.yuan import YuanConfig
from moe.train.run import CheckpointConfig, EvaluateConfig, RunConfig

STEPS = 300
GLOBAL = (LoadBalanceConfig(coefficient=0.01), ZLossConfig(coefficient=1e-4))


def _run(
    router: RouterConfig, balance: tuple[BalanceRule, ...] = GLOBAL, *, model: Any = None, **moe: Any
) -> RunConfig:
    """The quickstart with this router; `moe` and `model` change fields of the layer and of the model."""
    base = quickstart.get_config()
    assert base.model.moe is not None
    layer = dataclasses.replace(base.model.moe, router=router, **moe)
    return dataclasses.replace(
        base,
        steps=STEPS,
        batch_size=16,
        balance=balance,
        model=dataclasses.replace(base.model, moe=layer, **(model or {})),
        checkpoint=CheckpointConfig(every=STEPS, keep_best=0),
        evaluate=EvaluateConfig(every=0, final_max_bytes=32_768),
    )


def top_k() -> RunConfig:
    """softmax, best 2, weights divided by their sum; global load-balance loss and z-loss"""
    return _run(TopKConfig(num_selected=2, normalise="sum"))


def top_k_scores() -> RunConfig:
    """softmax, best 2, weights as they are (OLMoE)"""
    return _run(TopKConfig(num_selected=2))


def top_k_jitter() -> RunConfig:
    """as top_k, inputs of the router times U(0.99, 1.01)"""
    return _run(TopKConfig(num_selected=2, normalise="sum", jitter=0.01))


def top_k_sequence() -> RunConfig:
    """as top_k, load counted per sequence instead of over the global batch"""
    return _run(TopKConfig(num_selected=2, normalise="sum"), (LoadBalanceConfig(scope="sequence"), GLOBAL[1]))


def deepseek_v3() -> RunConfig:
    """sigmoid, best 2 in the best 2 of 4 groups, expert bias, small sequence-level loss"""
    router = TopKConfig(score="sigmoid", num_selected=2, normalise="sum", num_groups=4, num_groups_selected=2)
    return _run(router, (ExpertBiasConfig(rate=1e-2), LoadBalanceConfig(coefficient=1e-4, scope="sequence")))


def switch() -> RunConfig:
    """best 1 of 4 by softmax, jitter, capacity 1.25 with random token selection"""
    router = SwitchConfig(random_token_selection=True)
    return _run(router, num_experts=4, expert_hidden=256, dispatch=CapacityConfig(keep="priority"))


def expert_choice() -> RunConfig:
    """every expert takes its best tokens of a sequence; NOT causal: its loss is not that of a language model"""
    return _run(ExpertChoiceConfig(capacity_factor=2.0), (), model={"allow_non_causal": True})


def sigma_moe() -> RunConfig:
    """sigmoid, best 2, entropy of the mean probability, expert dropout 0.05, dense-equivalent initial weights"""
    return _run(SigmaConfig(dropout=0.05), (EntropyConfig(coefficient=1e-3),), expert_init="dense_equivalent")


def yuan() -> RunConfig:
    """attention between experts; global load-balance loss (the paper has none)"""
    return _run(YuanConfig(num_selected=2))


def dense_to_sparse() -> RunConfig:
    """Gumbel-softmax from all experts to few, temperature 2 to 0.3; costs all 8 experts"""
    return _run(DenseToSparseConfig(temperature=TemperatureConfig(start=2.0, end=0.3, decay_steps=STEPS)))


def activation_gate() -> RunConfig:
    """best 2 of softmax((silu(x W) + b) / tau) with learned tau"""
    return _run(ActivationGateConfig(activation="silu", learned=True, normalise="sum"))


def product_key() -> RunConfig:
    """experts on a 4 x 2 grid, scored by coordinates, beam search"""
    return _run(ProductKeyConfig(num_selected=2, grid=(4, 2)))


def product_key_failures() -> RunConfig:
    """as product_key, an expert fails a token with probability 0.1 in training"""
    return _run(ProductKeyConfig(num_selected=2, grid=(4, 2), failure_rate=0.1))


def pregate() -> RunConfig:
    """one small causal router on the embeddings decides for all layers"""
    return _run(PreGateConfig(num_selected=2, normalise="sum"))


def soft() -> RunConfig:
    """every expert, weighted by softmax; costs all 8 experts"""
    return _run(SoftConfig(), ())


def soft_moe() -> RunConfig:
    """experts run on 32 mixtures of a sequence's tokens; NOT causal: its loss is not that of a language model"""
    return _run(SoftMoEConfig(slots_per_expert=32, normalise=True), (), model={"allow_non_causal": True})


def static_task() -> RunConfig:
    """the domain of the text fixes one expert, and one general expert serves all"""
    return _run(StaticTaskConfig(tasks=tuple((task + 1,) for task in range(6)), general=(0,)), ())


def hashed() -> RunConfig:
    """two experts fixed by a hash of the byte"""
    return _run(HashConfig(num_selected=2), ())


def random_choice() -> RunConfig:
    """two experts at random"""
    return _run(RandomConfig(num_selected=2), ())


def round_robin() -> RunConfig:
    """forced balance: experts in turn by position"""
    return _run(RoundRobinConfig(num_selected=2), ())
