"""A linear map per expert, held as one stacked tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moestro.kernels import grouped_matmul


@dataclass(frozen=True, eq=False)
class StackedLinear:
    """Applies stacked weights (and biases) to rows grouped by expert.

    Attributes:
        offsets: where groups begin, `[experts + 1]`.
        kernel: back end of the grouped product.
    """

    offsets: Tensor
    kernel: str

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """rows `[rows, in]`, weight `[experts, in, out]`, bias `[experts, out]` or None -> `[rows, out]`."""
        rows = grouped_matmul(rows, weight, self.offsets, self.kernel)
        if bias is None:
            return rows
        per_row = bias.repeat_interleave(self.offsets.diff(), dim=0, output_size=len(rows))
        return rows + per_row.to(rows.dtype)

    @staticmethod
    def initialise(bank: nn.Module, std: float | None) -> None:
        """Weights `[experts, in, out]` from normal(0, std or 1/sqrt(in)), biases `[experts, out]` to zero."""
        with torch.no_grad():
            for parameter in bank.parameters():
                if parameter.dim() == 2:
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, std or parameter.shape[1] ** -0.5)
