"""Layers made of a router and experts."""

from moestro.layers.dense_moe_block import DenseMoEBlock
from moestro.layers.moe import Loss, MoE, ParameterCounts
from moestro.layers.spread import Gradients, spread

__all__ = ["DenseMoEBlock", "Gradients", "Loss", "MoE", "ParameterCounts", "spread"]
