"""AdamW with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FUSED = ("cpu", "cuda", "xpu", "mps")


def decays(name: str, parameter: Tensor, embeddings: set[int]) -> bool:
    """Matrices decay; norms, biases (also the stacked ones of experts) and embeddings do not."""
    return parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in embeddings


def parameter_groups(
    model: nn.Module, weight_decay: float, kept: Callable[[nn.Parameter], bool] = lambda parameter: True
) -> list[dict[str, Any]]:
    """Two groups of `(name, parameter)` pairs, with and without weight decay, of the parameters that are `kept`."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and kept(p)]
    return [
        {"params": [(n, p) for n, p in named if decays(n, p, embeddings)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if not decays(n, p, embeddings)], "weight_decay": 0.0},
    ]


def build_optimiser(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    kept: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where the device has such a kernel.

    Args:
        learning_rate: peak; the loop multiplies it by the schedule's share at each step.
        weight_decay: of matrices only, see `decays`.
        betas: decay of the first and second moments.
        kept: whether this process steps a parameter; other processes step the others.
    """
    groups = [group for group in parameter_groups(model, weight_decay, kept) if group["params"]]
    fused = all(p.device.type in _FUSED for p in model.parameters())
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Give every group this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = value
