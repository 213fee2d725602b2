"""Planning a run before it is paid for: parameters and FLOPs, counted from the config without a device or memory."""

from moe.plan.flops import peak_flops, train_flops_per_token
from moe.plan.parameters import Parameters, count

__all__ = ["Parameters", "count", "peak_flops", "train_flops_per_token"]
