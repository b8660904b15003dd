"""Experts that cost nothing: zero, copy and constant (Jin et al. 2024, MoE++, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.experts.base import Experts


class ZeroExperts(Experts):
    """Experts that discard their rows: `f(x) = 0` (MoE++ eq. 3)."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, width

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return torch.zeros_like(rows)


class CopyExperts(Experts):
    """Experts that return their rows: `f(x) = x` (MoE++ eq. 4)."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, width

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return rows


class ConstantExperts(Experts):
    """Experts that blend a row with a learned vector.

        f_e(x) = a_1 x + a_2 v_e,   [a_1, a_2] = softmax(x W_e)        MoE++ eq. 5

    Parameters: weight `[experts, width, 2]` and vector `[experts, width]`, both zero at the start.
    """

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, width
        self.weight = nn.Parameter(torch.zeros(num_experts, width, 2))
        self.vector = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        load, total = offsets.diff(), len(rows)
        weight = self.weight.repeat_interleave(load, dim=0, output_size=total)
        vector = self.vector.repeat_interleave(load, dim=0, output_size=total).to(rows.dtype)
        share = torch.einsum("rw,rwc->rc", rows, weight.to(rows.dtype)).softmax(-1).to(rows.dtype)
        return share[:, :1] * rows + share[:, 1:] * vector
