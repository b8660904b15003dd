"""Stacked matrices as the operands of per-expert products, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.plan import Chunk, Plan

# A product of 1024 x rows by rows x 512 in bfloat16 that adds to its target takes 20 us longer than one that writes
# it at 64 rows and 145 us at 512; adding afterwards takes 80 us.
FEW_ROWS = 256


@dataclass(frozen=True, eq=False)
class _Part:
    """One stacked weight, whole and an expert at a time, and the columns that it fills."""

    columns: slice
    weight: Tensor
    bias: Tensor | None
    weight_of: Sequence[Tensor]
    bias_of: Sequence[Tensor] | None


class Matrices:
    """Stacked weights side by side that multiply the rows of a chunk, an expert at a time, into given memory.

    Args:
        weights: each `[experts, in, out]`; those that are None are left out.
        biases: of each, `[experts, out]` or None.
        dtype: of the rows; weights of another are cast one expert at a time.
    """

    def __init__(
        self, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], dtype: torch.dtype
    ) -> None:
        self._parts: list[_Part] = []
        self._dtype = dtype
        self.columns = 0
        for weight, bias in zip(weights, biases, strict=True):
            if weight is None:
                continue
            columns = slice(self.columns, self.columns + weight.shape[2])
            bias = None if bias is None else bias.to(dtype)
            bias_of = None if bias is None else bias.unbind(0)
            self._parts.append(_Part(columns, weight, bias, weight.unbind(0), bias_of))
            self.columns = columns.stop

    def multiply(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """`out = rows W_e + b_e`, `[rows, in] -> [rows, columns]`."""
        if chunk.index is not None:
            self._multiply_batch(chunk, chunk.index, rows, out)
            return
        for part, block in self._blocks(out):
            for e, x, y in chunk.pieces(rows, block):
                if part.bias_of is None:
                    torch.mm(x, self._weight(part, e), out=y)
                else:
                    torch.addmm(part.bias_of[e], x, self._weight(part, e), out=y)

    def multiply_transposed(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """`out = rows W_e^T`, `[rows, columns] -> [rows, in]`."""
        if chunk.index is not None:
            torch.bmm(chunk.batch(rows), self._weights(chunk).transpose(1, 2), out=chunk.batch(out))
            return
        for number, (part, block) in enumerate(self._blocks(rows)):
            for e, x, y in chunk.pieces(block, out):
                if number:
                    torch.addmm(y, x, self._weight(part, e).t(), out=y)
                else:
                    torch.mm(x, self._weight(part, e).t(), out=y)

    def add_bias_products(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """`out[i] += <rows[i], b_e>`, nothing without a bias."""
        for part, block in self._blocks(rows):
            if part.bias_of is None:
                continue
            for e, x, y in chunk.groups(block, out):
                y.add_(torch.mv(x, part.bias_of[e]))

    def _blocks(self, rows: Tensor) -> Iterator[tuple[_Part, Tensor]]:
        """Each part with its columns of these rows."""
        return ((part, rows[:, part.columns]) for part in self._parts)

    def _weight(self, part: _Part, e: int) -> Tensor:
        return part.weight_of[e].to(self._dtype)

    def _weights(self, chunk: Chunk) -> Tensor:
        """All weights of the chunk's experts side by side, `[experts, in, columns]`, cast as they are copied."""
        like = self._parts[0].weight
        weights = torch.empty(
            len(chunk.experts), like.shape[1], self.columns, dtype=self._dtype, device=like.device
        )
        for part in self._parts:
            places = weights[..., part.columns].unbind(0)
            torch._foreach_copy_(places, [part.weight_of[e] for e in chunk.experts])
        return weights

    def _multiply_batch(self, chunk: Chunk, experts: Tensor, rows: Tensor, out: Tensor) -> None:
        biases = [part.bias.index_select(0, experts) for part in self._parts if part.bias is not None]
        if biases:
            bias = torch.cat(biases, -1).unsqueeze(1)
            torch.baddbmm(bias, chunk.batch(rows), self._weights(chunk), out=chunk.batch(out))
        else:
            torch.bmm(chunk.batch(rows), self._weights(chunk), out=chunk.batch(out))


class Gradients:
    """The gradients of stacked parameters, filled in an expert at a time; zero for experts without rows.

    Args:
        parameters: by name; those that are None have none.
        need: which are asked for.
        plan: says which experts have rows.
        into: earlier gradients that these are added to, of all parameters or of none.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor | None],
        need: Mapping[str, bool],
        plan: Plan,
        into: Mapping[str, Tensor],
    ) -> None:
        self.found: dict[str, Tensor] = {}
        self._adds = bool(into)
        self._slices: dict[str, tuple[Tensor, ...]] = {}
        busy = {e for chunk in plan.chunks for e in chunk.experts}
        for name, parameter in parameters.items():
            if parameter is None or not need[name]:
                continue
            gradient = into[name] if into else torch.empty_like(parameter)
            self.found[name], self._slices[name] = gradient, gradient.unbind(0)
            for e in set(range(len(parameter))) - busy if not into else ():
                self._slices[name][e].zero_()

    def add(self, names: Sequence[str], chunk: Chunk, rows: Tensor, gradient: Tensor) -> None:
        """`rows^T gradient` of each expert in the chunk; parameters side by side share the gradient's columns."""
        columns = gradient.shape[1] // len(names)
        blocks = {name: slice(i * columns, (i + 1) * columns) for i, name in enumerate(names) if name in self.found}
        if chunk.index is not None:
            self._add_batch(blocks, chunk, rows, gradient)
            return
        for name, block in blocks.items():
            for e, x, g in chunk.groups(rows, gradient[:, block]):
                target = self._slices[name][e]
                if target.dtype != x.dtype:
                    self._put([target], [torch.mm(x.t(), g)])
                elif not self._adds:
                    torch.mm(x.t(), g, out=target)
                elif len(x) <= FEW_ROWS:
                    torch.addmm(target, x.t(), g, out=target)
                else:
                    target.add_(torch.mm(x.t(), g))

    def _add_batch(self, blocks: Mapping[str, slice], chunk: Chunk, rows: Tensor, gradient: Tensor) -> None:
        """One product for all parameters side by side: it reads the rows once, and wide products are quicker."""
        if not blocks:
            return
        first = min(block.start for block in blocks.values())
        wanted = gradient[:, first : max(block.stop for block in blocks.values())]
        products = torch.bmm(chunk.batch(rows).transpose(1, 2), chunk.batch(wanted))
        for name, block in blocks.items():
            mine = products[..., block.start - first : block.stop - first]
            self._put([self._slices[name][e] for e in chunk.experts], mine.unbind(0))

    def add_bias(self, name: str, chunk: Chunk, gradient: Tensor, scale: Tensor | None = None) -> None:
        """The sum of each expert's gradient rows, each times its entry of scale `[rows, 1]`."""
        if name not in self.found:
            return
        if scale is not None:
            gradient = gradient * scale
        for e, g in chunk.groups(gradient):
            total = torch.sum(g, 0, dtype=torch.promote_types(g.dtype, torch.float32))
            self._put([self._slices[name][e]], [total])

    def _put(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Values rounded to the gradient's dtype, in the place of what is there or added to it."""
        if not self._adds:
            torch._foreach_copy_(list(targets), list(values))
            return
        for target, value in zip(targets, values, strict=True):
            target.add_(value.to(target.dtype) if target.itemsize < value.itemsize else value)
