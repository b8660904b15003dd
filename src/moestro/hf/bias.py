"""Training the selection bias that many released models carry and transformers never updates."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.hf.families import FoundLayer, find_layers


def check_bias(layer: FoundLayer) -> Tensor:
    """The layer's selection bias.

    Raises:
        ValueError: a family without one, or a bias whose dtype loses its updates.
    """
    bias = layer.bias
    if bias is None:
        raise ValueError(
            f"{layer.family.name} has no selection bias, so bias_rate cannot act on {layer.name}; "
            "balance it with a loss instead"
        )
    if bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the selection bias of {layer.name} is {str(bias.dtype).removeprefix('torch.')}, which loses updates "
            "of 0.001; call moestro.hf.exact_bias(model) first"
        )
    return bias


@torch.no_grad()
def update_bias(layer: FoundLayer, load: Tensor, rate: float, group: dist.ProcessGroup | None = None) -> None:
    """Move the selection bias towards an even load, in place.

        b_e <- b_e + rate * sign(mean load - load_e)        Wang et al. 2024, algorithm 1; DeepSeek-AI 2024 (V3)

    Args:
        layer: its bias moves.
        load: choices per expert of the whole optimiser step on this process, `[experts]`.
        rate: step of the bias.
        group: ranks whose loads are added first; None = all, if torch.distributed runs.
    """
    load = load.double()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(load, group=group)
    bias = check_bias(layer)
    bias += (rate * torch.sign(load.mean() - load)).to(bias.dtype).view_as(bias)


@torch.no_grad()
def exact_bias(model: nn.Module) -> nn.Module:
    """Hold the selection biases of a model in float32 again after `model.to(torch.bfloat16)`.

    The model runs as before: routers add the bias to scores in the wider dtype. What the cast has already rounded
    stays rounded.

    Returns: the model.

    Raises:
        ValueError: a model without a mixture layer.
    """
    for layer in find_layers(model).values():
        if layer.bias is not None and layer.family.bias is not None:
            *path, name = layer.family.bias.split(".")
            holder: Any = layer.block.get_submodule(".".join(path))
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.data = layer.bias.data.float()
            else:
                setattr(holder, name, layer.bias.float())
    return model
