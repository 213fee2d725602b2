"""Optimizers and schedules, assembled from optax."""

from moe.optim.adamw import AdamWConfig
from moe.optim.schedule import ScheduleConfig, WarmupCosineConfig, WarmupStableDecayConfig

__all__ = ["AdamWConfig", "ScheduleConfig", "WarmupCosineConfig", "WarmupStableDecayConfig"]
