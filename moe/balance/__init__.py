"""What keeps experts in use: losses and bias updates computed from per-sequence statistics, in any scope."""

from moe.balance.base import BalanceRule, Batch
from moe.balance.expert_bias import ExpertBiasConfig, selection_bias
from moe.balance.load_balance import LoadBalanceConfig
from moe.balance.statistics import Statistics, load, summary
from moe.balance.z_loss import ZLossConfig

__all__ = [
    "BalanceRule",
    "Batch",
    "ExpertBiasConfig",
    "LoadBalanceConfig",
    "Statistics",
    "ZLossConfig",
    "load",
    "selection_bias",
    "summary",
]
