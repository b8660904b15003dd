"""A linear map per expert, held as one stacked tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def hidden_dims(bank: nn.Module) -> dict[str, int]:
    """The dimension of `gate`, `up` and `down` that is the hidden size."""
    return {name: 1 if name == "down" else -1 for name, _ in bank.named_parameters()}


def hidden_slice(bank: Any, part: int, parts: int) -> dict[str, Tensor]:
    """The columns of `gate` and `up` and the rows of `down` of one of several slices along the hidden size.

    Raises:
        ValueError: a hidden size that does not divide so, or biases, of which the last belongs to no slice.
    """
    if bank.hidden % parts:
        raise ValueError(f"hidden={bank.hidden} cannot be cut into {parts} equal slices")
    if bank.bias:
        raise ValueError("experts with bias cannot be sliced along their hidden size; use bias=False or tensor=1")
    size = bank.hidden // parts
    cut = slice(part * size, (part + 1) * size)
    return {name: p[:, cut] if name == "down" else p[..., cut] for name, p in bank.named_parameters()}
