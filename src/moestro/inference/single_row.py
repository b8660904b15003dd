"""The two maps of a single row that every layer is made of, with as little around them as possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.experts import GLU, MLP, FeedForward, QuantisedLinear
from moestro.inference.choose_steps import choose_steps
from moestro.models.norm import RMSNorm

Map = Callable[[Tensor], Tensor]


class Norm:
    """An `RMSNorm` of one float32 row, its mean square a number of Python: four operators become two.

    Shapes: `[1, width]` -> the same.
    """

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, RMSNorm)
        self.weight, self.eps = norm.weight.detach().float(), norm.eps
        self.zero = torch.zeros_like(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        row = x.view(-1)
        scale: float = (torch.dot(row, row).item() / len(row) + self.eps) ** -0.5
        return torch.addcmul(self.zero, x, self.weight, value=scale)


def as_map(module: nn.Module, dtype: torch.dtype) -> Map:
    """A module as a map of one float32 row, which it gets in the dtype of its weights, or else in `dtype`."""
    if type(module) is QuantisedLinear and module.bias is None:
        return lambda row: module.matrix.each(row.bfloat16(), [0])
    if type(module) is not nn.Linear:
        return lambda row: module(row.to(dtype))
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if bias is None and weight.t().is_contiguous() and weight.dtype in (torch.float32, torch.bfloat16):
        return _Columns(weight.t())
    return lambda row: F.linear(row.to(weight.dtype), weight, bias)


def lay_out_for_decoding(model: nn.Module, steps: str = "auto") -> None:
    """Lay matrices out as steps of decoding read them fastest, in place: values, shapes and names stay as they are.

    torch's operators want bfloat16 maps input by input: one row then reads memory at 42 instead of 21 GB/s (2
    threads, see `benchmarks/model.py`). Compiled steps read maps as they are, and want experts, stacked or
    alone, output by output: 66 instead of 41 GB/s. A head that shares its matrix with the embedding stays, since
    the embedding reads whole rows.

    Args:
        model: on a CPU; only bfloat16 maps, and float32 or bfloat16 networks, are touched.
        steps: as `generate` takes them.

    Raises:
        ValueError: compiled steps where there are none.
    """
    compiled = choose_steps(steps) == "compiled"
    tables = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if compiled and type(module) in (GLU, MLP, FeedForward):
            for name in ("gate", "up", "down"):
                _turn(getattr(module, name, None))
        elif not compiled and type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            _turn(None if module.weight.data_ptr() in tables else module.weight)


def _turn(weight: Tensor | None) -> None:
    """The memory of the last two dimensions changes places, if it has not yet."""
    if weight is not None and weight.device.type == "cpu" and not weight.mT.is_contiguous():
        weight.data = weight.data.mT.contiguous().mT


class _Columns:
    """One row times a matrix `[in, out]`, as weighted bags of embeddings: one of the inputs of each thread."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, inputs = matrix, len(matrix)
        self.index = torch.arange(inputs)
        parts = max(1, min(torch.get_num_threads(), inputs))
        self.starts = torch.arange(parts) * inputs // parts

    def __call__(self, row: Tensor) -> Tensor:
        shares = row.to(self.matrix.dtype).view(-1)
        parts = torch.embedding_bag(self.matrix, self.index, self.starts, False, 0, False, shares)[0]
        return parts if len(parts) == 1 else parts.sum(0, keepdim=True, dtype=torch.float32)
