"""What keeps experts in use: losses and bias updates computed from per-sequence statistics, in any scope."""

from moe.balance.base import BalanceRule, Batch, asked
from moe.balance.entropy import EntropyConfig
from moe.balance.expert_bias import ExpertBiasConfig, selection_bias
from moe.balance.importance import ImportanceConfig
from moe.balance.load_balance import LoadBalanceConfig
from moe.balance.quantile import QuantileConfig
from moe.balance.shuffled import ShuffledLoadBalanceConfig
from moe.balance.statistics import Statistics, idle_steps, load, summary
from moe.balance.z_loss import ZLossConfig

__all__ = [
    "BalanceRule",
    "Batch",
    "EntropyConfig",
    "ExpertBiasConfig",
    "ImportanceConfig",
    "LoadBalanceConfig",
    "QuantileConfig",
    "ShuffledLoadBalanceConfig",
    "Statistics",
    "ZLossConfig",
    "asked",
    "idle_steps",
    "load",
    "selection_bias",
    "summary",
]
