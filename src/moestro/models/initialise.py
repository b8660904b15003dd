"""The starting weights of a language model."""

from __future__ import annotations

from torch import Tensor, nn

from moestro.experts import GLU, MLP, FeedForward
from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import DecoderLM
from moestro.models.latent import LatentAttention


def initialise(model: DecoderLM, embedding_std: float = 0.02) -> None:
    """Draw all weights but those of routers, which their methods initialise.

    Matrices are normal(0, 1/sqrt(2 inputs)). Those that write into the residual stream start at zero, so that every
    layer begins as the identity and experts add nothing before they have learned (docs/log.md has the figures).
    Stacked experts, shared experts and dense layers are drawn alike.

    Args:
        model: with weights to be replaced.
        embedding_std: of embedding and head, normal(0, std).
    """
    nn.init.normal_(model.embedding.weight, std=embedding_std)
    nn.init.normal_(model.head.weight, std=embedding_std)
    for module in model.layers.modules():
        if isinstance(module, GroupedQueryAttention | LatentAttention):
            for name, parameter in module.named_parameters():
                _draw(name, parameter, inputs=parameter.shape[-1], residual="output.weight")
        if isinstance(module, GLU | MLP | FeedForward):
            for name, parameter in module.named_parameters():
                _draw(name, parameter, inputs=parameter.shape[-2] if parameter.dim() > 1 else 1, residual="down")


def _draw(name: str, parameter: Tensor, inputs: int, residual: str) -> None:
    if name == residual or name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif "norm" not in name:
        nn.init.normal_(parameter, std=(2 * inputs) ** -0.5)
