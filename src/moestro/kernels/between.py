"""What a bank does to rows between its products: the non-linearity, its derivative and the combine weights.

    forward    h = act(g) u                                  (act(u) without a gate)
    backward   h w,   dg = w dh u act'(g),   du = w dh act(g),   dw = <dh, h>

Two ways to the same numbers up to rounding: torch's operators one after the other, each rounding what it writes,
and one compiled pass (extra `[fast]`), which rounds once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moestro.kernels.activate import FUSED, Activation
from moestro.kernels.compiled import why_not
from moestro.kernels.plan import Chunk


class Between(ABC):
    """The rows between two products.

    Args:
        activation: name of the non-linearity.
        hidden: columns of h.
    """

    def __init__(self, activation: str, hidden: int) -> None:
        self.activation: Activation = FUSED[activation]
        self.hidden = hidden

    @property
    def spare(self) -> int:
        """Columns of rows that the backward needs to work in."""
        return 0

    @abstractmethod
    def forward(self, chunk: Chunk, inner: Tensor, h: Tensor) -> None:
        """`h [rows, hidden]` of pre-activations `[rows, hidden]` or, gate before up, `[rows, 2 hidden]`."""

    @abstractmethod
    def backward(
        self,
        chunk: Chunk,
        inner: Tensor,
        dh: Tensor,
        weight: Tensor | None,
        h: Tensor,
        d_inner: Tensor,
        d_weight: Tensor | None,
        spare: Tensor,
    ) -> None:
        """`h` times the weights, `d_inner` like `inner`, and `d_weight [rows]` where it is asked for.

        Args: dh: gradient of h before the weights `[rows, hidden]`; spent. weight: of the chunk's rows, `[rows]`
        float32 at least; None = 1. spare: `[rows, spare]`.
        """

    def halves(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up; twice the same without a gate."""
        return inner[:, : self.hidden], inner[:, -self.hidden :]


class Operators(Between):
    """torch's operators: any non-linearity, dtype and device."""

    @property
    def spare(self) -> int:
        return self.hidden if self.activation.gated else 0

    def forward(self, chunk: Chunk, inner: Tensor, h: Tensor) -> None:
        self._activate(chunk, inner, h, h)

    def backward(
        self,
        chunk: Chunk,
        inner: Tensor,
        dh: Tensor,
        weight: Tensor | None,
        h: Tensor,
        d_inner: Tensor,
        d_weight: Tensor | None,
        spare: Tensor,
    ) -> None:
        self._activate(chunk, inner, spare, h)
        if d_weight is not None:
            torch.sum(torch.mul(dh, h, out=d_inner[:, : self.hidden]), 1, dtype=d_weight.dtype, out=d_weight)
        if weight is not None:
            scale = weight.unsqueeze(1).to(dh.dtype)
            dh.mul_(scale)
            h.mul_(scale)
        gate, up = self.halves(inner)
        d_gate, d_up = self.halves(d_inner)
        if self.activation.gated:
            torch.mul(dh, spare, out=d_up)
            dh.mul_(up)
        chunk.rowwise(self.activation.backward, dh, gate, d_gate)

    def _activate(self, chunk: Chunk, inner: Tensor, act: Tensor, out: Tensor) -> None:
        """`act(gate)` into `act` and its product with `up` into `out`; without a gate `act(up)` into `out`."""
        gate, up = self.halves(inner)
        if not self.activation.gated:
            act = out
        chunk.rowwise(self.activation.forward, gate, act)
        if self.activation.gated:
            torch.mul(act, up, out=out)


class OnePass(Between):
    """One compiled pass: swiglu in float32 and bfloat16 on a CPU, `FEWEST_COLUMNS` of h at least.

    Args:
        dtype: of the rows.
    """

    def __init__(self, activation: str, hidden: int, dtype: torch.dtype) -> None:
        super().__init__(activation, hidden)
        self._forward, self._backward = _steps(dtype)

    def forward(self, chunk: Chunk, inner: Tensor, h: Tensor) -> None:
        gate, up = self.halves(inner)
        self._forward(gate.data_ptr(), up.data_ptr(), *h.shape, _stride(inner), h.data_ptr(), _stride(h))

    def backward(
        self,
        chunk: Chunk,
        inner: Tensor,
        dh: Tensor,
        weight: Tensor | None,
        h: Tensor,
        d_inner: Tensor,
        d_weight: Tensor | None,
        spare: Tensor,
    ) -> None:
        gate, up = self.halves(inner)
        d_gate, d_up = self.halves(d_inner)
        assert dh.stride() == h.stride(), "rows of h and of its gradient lie alike"
        self._backward(
            gate.data_ptr(), up.data_ptr(), *h.shape, _stride(inner), dh.data_ptr(), h.data_ptr(), _stride(h),
            d_gate.data_ptr(), d_up.data_ptr(), _stride(d_inner), _place(weight), _place(d_weight),
        )  # fmt: skip


def between_for(activation: str, hidden: int, like: Tensor) -> Between:
    """The quickest way there is for rows like these."""
    compiled = activation == "swiglu" and like.dtype in _SHORT and like.device.type == "cpu"
    if compiled and hidden >= FEWEST_COLUMNS and why_not() is None:
        return OnePass(activation, hidden, like.dtype)
    return Operators(activation, hidden)


FEWEST_COLUMNS = 16  # that the compiled pass reads at once
_SHORT = {torch.bfloat16: True, torch.float32: False}


@cache
def _steps(dtype: torch.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    """Compiled forward and backward."""
    from moestro.kernels.compiled.gated import backward_step, forward_step

    return forward_step(_SHORT[dtype]), backward_step(_SHORT[dtype])


def _stride(rows: Tensor) -> int:
    """From one row to the next, in bytes."""
    assert rows.stride(1) == 1, "the numbers of a row lie side by side"
    return rows.stride(0) * rows.itemsize


def _place(numbers: Tensor | None) -> int:
    assert numbers is None or (numbers.dtype == torch.float32 and numbers.is_contiguous())
    return 0 if numbers is None else numbers.data_ptr()
