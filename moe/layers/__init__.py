"""Layers: norm, attention, MLPs and the MoE layer. They know nothing of training."""
