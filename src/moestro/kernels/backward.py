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
        wide = torch.promote_types(given.x.dtype, torch.float32)
        # as the forward rounded them
        weight = None if given.weight is None else given.weight.to(given.x.dtype).to(wide)
        self.weight = None if weight is None else plan.spread_weight(weight)
        self.filling = plan.filling() if self.weight is None else None
        self.source = plan.source if given.order is None else call.source  # of rows of grad
        self.grad_rows = given.x.new_empty(plan.rows if need["x"] else 0, call.width)
        self.grad_weight = torch.empty(plan.rows, dtype=wide)

    def run(self) -> dict[str, Tensor]:
        """The gradients that are asked for, by name."""
        call, given = self.call, self.call.given
        columns = {"rows": call.width, "h": call.hidden, "dh": call.hidden, "d_inner": call.inner.columns}
        columns |= {"spare": call.between.spare}
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
        h, dh, d_inner = (scratch(name, chunk) for name in ("h", "dh", "d_inner"))
        inner = self._inner(chunk, scratch)
        dy = picked(self.grad, self.source, chunk, scratch("rows", chunk))
        call.outer.multiply_transposed(chunk, dy, dh)
        self._through(chunk, dy, inner, dh, h, d_inner, scratch("spare", chunk))
        self._outer_gradients(chunk, h, dy)
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

    def _through(
        self, chunk: Chunk, dy: Tensor, inner: Tensor, dh: Tensor, h: Tensor, d_inner: Tensor, spare: Tensor
    ) -> None:
        """Weighted h, and the gradients of pre-activations and combine weights; zero in rows that only fill."""
        weight = None if self.weight is None else self.weight[chunk.start : chunk.stop]
        wanted = weight is not None and self.need["weight"]
        d_weight = self.grad_weight[chunk.start : chunk.stop] if wanted else None
        if weight is None and self.filling is not None:
            clear_filling(self.filling, chunk, dy, dh)
        self.call.between.backward(chunk, inner, dh, weight, h, d_inner, d_weight, spare)
        if d_weight is not None:
            self.call.outer.add_bias_products(chunk, dy, d_weight)

    def _outer_gradients(self, chunk: Chunk, weighted: Tensor, dy: Tensor) -> None:
        self.gradients.add(("down",), chunk, weighted, dy)
        self.gradients.add_bias("down_bias", chunk, dy, None if self.weight is None else self._scale(chunk, dy))

    def _scale(self, chunk: Chunk, like: Tensor) -> Tensor:
        """The chunk's combine weights, `[rows, 1]`."""
        assert self.weight is not None
        return self.weight[chunk.start : chunk.stop].unsqueeze(1).to(like.dtype)

    def _inner_gradients(self, chunk: Chunk, rows: Tensor, d_inner: Tensor) -> None:
        names = ("gate", "up") if self.call.given.gate is not None else ("up",)
        self.gradients.add(names, chunk, rows, d_inner)
        blocks = self.call.between.halves(d_inner) if len(names) == 2 else (d_inner,)
        for name, block in zip(names, blocks, strict=True):
            self.gradients.add_bias(f"{name}_bias", chunk, block)
