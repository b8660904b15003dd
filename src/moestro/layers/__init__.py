"""Layers made of a router and experts."""

from moestro.layers.moe import MoE, ParameterCounts

__all__ = ["MoE", "ParameterCounts"]
