"""Normalisation of the residual stream, and the constants that some models scale it by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Times(nn.Module):
    """Multiplies by a constant. Shapes: `[...]` -> the same."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


def times(factor: float) -> nn.Module:
    """`Times`, or nothing where the factor is 1."""
    return nn.Identity() if factor == 1 else Times(factor)


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis and scales each feature.

        y = x / sqrt(mean(x^2) + eps) * weight    Zhang and Sennrich 2019, eq. 4

    Args:
        width: size of the last axis.
        eps: added to the mean square.

    Shapes: `[..., width]` -> the same.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # a weight of another dtype than x misses the fused kernel
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


#: by name: how the residual stream is normalised; `layer` subtracts the mean and adds a bias (Ba et al. 2016)
NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}
