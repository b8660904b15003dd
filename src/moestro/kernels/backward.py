"""The gradients of a fused bank, a chunk at a time.

With `rows = D x`, `h = act(rows W_inner)` and `y = C w (h W_outer)`, the gradient that reaches h is
`dh = w dy W_outer^T`. That of a combine weight needs no output of an expert: `<dy, h W_outer> = <dy W_outer^T, h>`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moestro.kernels.arguments import PARAMETERS
from moestro.kernels.call import Call
from moestro.kernels.matrices import Gradients
from moestro.kernels.plan import Chunk
from moestro.kernels.queues import run_chunks
from moestro.kernels.rows import Scratch, clear_filling, picked


class Backward:
    """The backward of one call.

    Args:
        call: as it was for the forward.
        grad: of y, `[tokens, width]`.
        kept: the forward's pre-activations, without rows if they are to be computed again.
        need: which gradients are asked for.
        into: of `PARAMETERS`, earlier gradients that theirs are added to; of all that `need` asks for, or of none.
    """

    def __init__(
        self, call: Call, grad: Tensor, kept: Tensor, need: Mapping[str, bool], into: Mapping[str, Tensor]
    ) -> None:
        self.call, self.grad, self.kept, self.need = call, grad, kept, need
        given, plan = call.given, call.plan
        self.gradients = Gradients({name: getattr(given, name) for name in PARAMETERS}, need, plan, into)
        self.weight = None if given.weight is None else plan.spread_weight(given.weight)
        self.filling = plan.filling() if self.weight is None else None
        self.source = plan.source if given.order is None else call.source  # of rows of grad
        self.grad_rows = given.x.new_empty(plan.rows if need["x"] else 0, call.width)
        self.grad_weight = torch.empty(plan.rows, dtype=torch.promote_types(given.x.dtype, torch.float32))

    def run(self) -> dict[str, Tensor]:
        """The gradients that are asked for, by name."""
        call, given = self.call, self.call.given
        columns = {"rows": call.width, "h": call.hidden, "dh": call.hidden, "d_inner": call.inner.columns}
        columns |= {"act": call.hidden if call.activation.gated else 0}
        columns |= {"inner": 0 if len(self.kept) else call.inner.columns}
        run_chunks(call.plan.chunks, self.chunk, given.x, columns, call.threads)
        found = self.gradients.found
        if self.need["x"]:
            found["x"] = call.combine(self.grad_rows, None)
        if self.need["weight"] and given.weight is not None:
            found["weight"] = call.plan.collect(self.grad_weight).to(given.weight.dtype)
        return found

    def chunk(self, chunk: Chunk, scratch: Scratch) -> None:
        """From the gradient of the chunk's outputs to those of its rows and experts."""
        call = self.call
        act, h, dh, d_inner = (scratch(name, chunk) for name in ("act", "h", "dh", "d_inner"))
        inner = self._inner(chunk, scratch)
        dy = picked(self.grad, self.source, chunk, scratch("rows", chunk))
        call.activate(chunk, inner, act, h)
        call.outer.multiply_transposed(chunk, dy, dh)
        self._weigh(chunk, dy, h, dh, spare=d_inner[:, : call.hidden])
        self._outer_gradients(chunk, h, dy)
        self._through_activation(chunk, inner, act, dh, d_inner)
        rows = call.rows(chunk, scratch("rows", chunk))  # where dy was, which is spent
        self._inner_gradients(chunk, rows, d_inner)
        if self.need["x"]:
            call.inner.multiply_transposed(chunk, d_inner, self.grad_rows[chunk.start : chunk.stop])

    def _inner(self, chunk: Chunk, scratch: Scratch) -> Tensor:
        """The chunk's pre-activations."""
        if len(self.kept):
            return self.kept[chunk.start : chunk.stop]
        inner = scratch("inner", chunk)
        self.call.inner.multiply(chunk, self.call.rows(chunk, scratch("rows", chunk)), inner)
        return inner

    def _weigh(self, chunk: Chunk, dy: Tensor, h: Tensor, dh: Tensor, spare: Tensor) -> None:
        """The gradient of the combine weights; then h and dh times the weights, and zero in rows that only fill."""
        if self.weight is None:
            if self.filling is not None:
                clear_filling(self.filling, chunk, dy, dh)
            return
        if self.need["weight"]:
            grad_weight = self.grad_weight[chunk.start : chunk.stop]
            torch.sum(torch.mul(dh, h, out=spare), 1, dtype=grad_weight.dtype, out=grad_weight)
            self.call.outer.add_bias_products(chunk, dy, grad_weight)
        scale = self._scale(chunk, dh)
        dh.mul_(scale)
        h.mul_(scale)

    def _outer_gradients(self, chunk: Chunk, weighted: Tensor, dy: Tensor) -> None:
        self.gradients.add(("down",), chunk, weighted, dy)
        self.gradients.add_bias("down_bias", chunk, dy, None if self.weight is None else self._scale(chunk, dy))

    def _scale(self, chunk: Chunk, like: Tensor) -> Tensor:
        """The chunk's combine weights, `[rows, 1]`."""
        assert self.weight is not None
        return self.weight[chunk.start : chunk.stop].unsqueeze(1).to(like.dtype)

    def _through_activation(self, chunk: Chunk, inner: Tensor, act: Tensor, dh: Tensor, d_inner: Tensor) -> None:
        """The gradient of the pre-activations into `d_inner`; `dh` is spent."""
        gate, up = self.call.halves(inner)
        d_gate, d_up = self.call.halves(d_inner)
        if self.call.activation.gated:
            torch.mul(dh, act, out=d_up)
            dh.mul_(up)
        chunk.rowwise(self.call.activation.backward, dh, gate, d_gate)

    def _inner_gradients(self, chunk: Chunk, rows: Tensor, d_inner: Tensor) -> None:
        names = ("gate", "up") if self.call.given.gate is not None else ("up",)
        self.gradients.add(names, chunk, rows, d_inner)
        blocks = self.call.halves(d_inner) if len(names) == 2 else (d_inner,)
        for name, block in zip(names, blocks, strict=True):
            self.gradients.add_bias(f"{name}_bias", chunk, block)
