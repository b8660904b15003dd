"""The two maps of a single row that every layer is made of, with as little around them as possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.experts import QuantisedLinear
from moestro.models.norm import RMSNorm

Map = Callable[[Tensor], Tensor]


class Norm:
    """An `RMSNorm` of one float32 row, its mean square a number of Python: four operators become two.

    Shapes: `[1, width]` -> the same.
    """

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach().float(), norm.eps
        self.zero = torch.zeros_like(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        row = x.view(-1)
        scale: float = (torch.dot(row, row).item() / len(row) + self.eps) ** -0.5
        return torch.addcmul(self.zero, x, self.weight, value=scale)


def as_map(module: nn.Module, dtype: torch.dtype) -> Map:
    """A module as a map of one float32 row, which it gets in the dtype of its weights, or else in `dtype`."""
    if type(module) is nn.Linear:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        return lambda row: F.linear(row.to(weight.dtype), weight, bias)
    if type(module) is QuantisedLinear and module.bias is None:
        return lambda row: module.matrix.each(row.bfloat16(), [0])
    return lambda row: module(row.to(dtype))
