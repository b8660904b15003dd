"""AdamW with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_FUSED = ("cpu", "cuda", "xpu", "mps")


def decays(name: str, parameter: Tensor, embeddings: set[int]) -> bool:
    """Matrices decay; norms, biases (also the stacked ones of experts) and embeddings do not."""
    return parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in embeddings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of `(name, parameter)` pairs: with and without weight decay."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in named if decays(n, p, embeddings)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if not decays(n, p, embeddings)], "weight_decay": 0.0},
    ]


def build_optimiser(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where the device has such a kernel.

    Args:
        learning_rate: peak; the loop multiplies it by the schedule's share at each step.
        weight_decay: of matrices only, see `decays`.
        betas: decay of the first and second moments.
    """
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    fused = all(p.device.type in _FUSED for p in model.parameters())
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Give every group this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = value


def named_state(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name of each parameter and the optimiser's tensors for it; empty before the first step."""
    for group in optimiser.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, optimiser.state[parameter]
