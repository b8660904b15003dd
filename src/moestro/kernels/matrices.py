"""Stacked matrices as the operands of per-expert products, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moestro.kernels.plan import Chunk, Plan


class Matrices:
    """Stacked weights (and biases) that multiply the rows of a chunk, an expert at a time, into given memory.

    Args:
        weight: `[experts, in, out]`; None = there is no such map.
        bias: `[experts, out]` or None.
        dtype: of the rows; weights of another are cast one expert at a time.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = () if weight is None else weight.unbind(0)
        self.columns = 0 if weight is None else weight.shape[2]
        self._bias = None if bias is None else bias.to(dtype).unbind(0)
        self._dtype = dtype

    def __bool__(self) -> bool:
        return bool(self._weight)

    def multiply(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """`out = rows W_e + b_e`."""
        for e, x, y in chunk.pieces(rows, out):
            if self._bias is None:
                torch.mm(x, self._matrix(e), out=y)
            else:
                torch.addmm(self._bias[e], x, self._matrix(e), out=y)

    def multiply_transposed(self, chunk: Chunk, rows: Tensor, out: Tensor, add: bool = False) -> None:
        """`out = rows W_e^T`, or `out += rows W_e^T`."""
        for e, x, y in chunk.pieces(rows, out):
            if add:
                torch.addmm(y, x, self._matrix(e).t(), out=y)
            else:
                torch.mm(x, self._matrix(e).t(), out=y)

    def add_bias_products(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """`out[i] += <rows[i], b_e>`, nothing without a bias."""
        if self._bias is None:
            return
        for e, x, y in chunk.groups(rows, out):
            y.add_(torch.mv(x, self._bias[e]))

    def _matrix(self, e: int) -> Tensor:
        return self._weight[e].to(self._dtype)


class Gradients:
    """The gradients of stacked parameters, filled in an expert at a time; zero for experts without rows.

    Args:
        parameters: by name; those that are None have none.
        need: which are asked for.
        plan: says which experts have rows.
    """

    def __init__(self, parameters: Mapping[str, Tensor | None], need: Mapping[str, bool], plan: Plan) -> None:
        self.found: dict[str, Tensor] = {}
        self._slices: dict[str, tuple[Tensor, ...]] = {}
        busy = {e for chunk in plan.chunks for e in chunk.experts}
        for name, parameter in parameters.items():
            if parameter is None or not need[name]:
                continue
            gradient = torch.empty_like(parameter)
            self.found[name], self._slices[name] = gradient, gradient.unbind(0)
            for e in set(range(len(parameter))) - busy:
                self._slices[name][e].zero_()

    def add(self, name: str, chunk: Chunk, rows: Tensor, gradient: Tensor) -> None:
        """`rows^T gradient` of each expert in the chunk."""
        if name not in self.found:
            return
        for e, x, g in chunk.groups(rows, gradient):
            target = self._slices[name][e]
            if target.dtype == x.dtype:
                torch.mm(x.t(), g, out=target)
            else:
                target.copy_(torch.mm(x.t(), g))

    def add_bias(self, name: str, chunk: Chunk, gradient: Tensor, scale: Tensor | None) -> None:
        """The sum of each expert's gradient rows, each times its entry of scale `[rows, 1]`."""
        if name not in self.found:
            return
        if scale is not None:
            gradient = gradient * scale
        for e, g in chunk.groups(gradient):
            target = self._slices[name][e]
            target.copy_(torch.sum(g, 0, dtype=torch.promote_types(g.dtype, torch.float32)))
