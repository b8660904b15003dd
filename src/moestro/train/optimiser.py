"""AdamW with weight decay where it belongs, and gradients measured and clipped in as few passes as they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moestro.parallel.gradients import here

_FUSED = ("cpu", "cuda", "xpu", "mps")


def decays(name: str, parameter: Tensor, embeddings: set[int]) -> bool:
    """Matrices decay; norms, biases (also the stacked ones of experts) and embeddings do not."""
    return parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in embeddings


def parameter_groups(
    model: nn.Module, weight_decay: float, kept: Callable[[nn.Parameter], bool] = lambda parameter: True
) -> list[dict[str, Any]]:
    """Groups of `(name, parameter)` pairs, with and without weight decay, of the parameters that are `kept`.

    Parameters that are sharded are apart from those that are not, which no fused optimiser takes together.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and kept(p)]
    kinds = sorted({isinstance(p, DTensor) for _, p in named}) or [False]
    return [
        {
            "params": [
                (n, p)
                for n, p in named
                if decays(n, p, embeddings) == decayed and isinstance(p, DTensor) == sharded
            ],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for sharded in kinds
        for decayed in (True, False)
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


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of the gradients of these parameters together; 0 without any.

    On a CPU by one dot product each, which reads memory about twice as fast as a norm; only where their sum
    overflows, or a number is not finite, are norms taken.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and all(map(_dots, gradients)):
        flat = [gradient.view(-1) for gradient in gradients]
        norm = torch.stack([torch.dot(each, each) for each in flat]).sum().sqrt()
        if math.isfinite(norm):
            return norm
    return torch.nn.utils.get_total_norm(gradients)


def _dots(gradient: Tensor) -> bool:
    return gradient.device.type == "cpu" and gradient.dtype.itemsize >= 4 and gradient.is_contiguous()


@torch.no_grad()
def clipped_step(
    optimiser: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], norm: float, most: float
) -> None:
    """Step after scaling gradients so that their norm is at most `most`, as `torch.nn.utils.clip_grad_norm_` does.

    Gradients that are small enough are left alone. A fused float32 optimiser scales its own in the pass that it
    makes over them anyway.

    Args:
        optimiser: of some of the parameters, or all.
        parameters: of the whole model; the gradients of all of them are scaled.
        norm: of all gradients together.
        most: the limit; 0 = none.
    """
    excess = (norm + 1e-6) / most if most else 0.0
    if excess <= 1:
        optimiser.step()
        return
    stepped = [p for group in optimiser.param_groups for p in group["params"]]
    scales = getattr(optimiser, "_step_supports_amp_scaling", False)  # as torch's GradScaler asks
    # the scale is a float32, and whole
    scales = scales and all(p.dtype == torch.float32 and not isinstance(p, DTensor) for p in stepped)
    by_optimiser = {id(p) for p in stepped} if scales else set[int]()
    rest = [here(p.grad) for p in parameters if p.grad is not None and id(p) not in by_optimiser]
    if rest:
        torch._foreach_mul_(rest, 1 / excess)
    if not scales:
        optimiser.step()
        return
    optimiser.grad_scale = torch.tensor(excess)  # type: ignore[attr-defined]
    try:
        optimiser.step()
    finally:
        del optimiser.grad_scale  # type: ignore[attr-defined]
