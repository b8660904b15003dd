"""Layers made of a router and experts."""

from moestro.layers.dense_moe_block import DenseMoEBlock
from moestro.layers.moe import Loss, MoE, ParameterCounts

__all__ = ["DenseMoEBlock", "Loss", "MoE", "ParameterCounts"]
