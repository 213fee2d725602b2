"""Dispatchers: how assignments reach experts and come back. All agree with the dense oracle in value and gradient."""

from moe.dispatch.all_to_all import AllToAllConfig
from moe.dispatch.base import DispatchConfig, Dispatcher, ExpertWeights
from moe.dispatch.capacity import CapacityConfig
from moe.dispatch.dense import DenseConfig
from moe.dispatch.dropless import DroplessConfig
from moe.dispatch.exchange import ExchangeConfig, RingConfig
from moe.dispatch.ragged import RaggedConfig
from moe.dispatch.sharded import dispatch

__all__ = [
    "AllToAllConfig",
    "CapacityConfig",
    "DenseConfig",
    "DispatchConfig",
    "Dispatcher",
    "DroplessConfig",
    "ExchangeConfig",
    "ExpertWeights",
    "RaggedConfig",
    "RingConfig",
    "dispatch",
]
