"""The starting weights of a language model."""

from __future__ import annotations

import math

from torch import nn

from moestro.experts import GLU, MLP, FeedForward
from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import DecoderLM
from moestro.models.latent import LatentAttention


def initialise(model: DecoderLM, std: float = 0.02) -> None:
    """Draw all weights but those of routers, which their methods initialise.

    Matrices are normal(0, std); those that write into the residual stream normal(0, std / sqrt(2 layers))
    (Radford et al. 2019). Stacked experts, shared experts and dense layers are drawn alike.
    """
    residual_std = std / math.sqrt(2 * len(model.layers))
    nn.init.normal_(model.embedding.weight, std=std)
    nn.init.normal_(model.head.weight, std=std)
    for module in model.layers.modules():
        if isinstance(module, GroupedQueryAttention | LatentAttention):
            _draw(module, std, residual_std, residual="output.weight")
        if isinstance(module, GLU | MLP | FeedForward):
            _draw(module, std, residual_std, residual="down")


def _draw(module: nn.Module, std: float, residual_std: float, residual: str) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=residual_std if name == residual else std)
