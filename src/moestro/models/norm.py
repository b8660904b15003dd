"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 1 << 15  # elements; 16 rows of 1024 in bfloat16: 7 instead of 14 microseconds


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
        if x.numel() <= SMALL and x.device.type == "cpu" and not torch.is_grad_enabled():
            return self._by_layer_norm(x)
        # a weight of another dtype than x misses the fused kernel
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)

    def _by_layer_norm(self, x: Tensor) -> Tensor:
        """The same for few rows on a CPU, where torch composes `rms_norm` of eight operators and has one for this.

        The mean of a row beside its negative is zero, and its variance the mean square of the row.
        """
        both = torch.cat([x, -x], dim=-1)
        width = x.shape[-1]
        return F.layer_norm(both, (2 * width,), eps=self.eps)[..., :width] * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
