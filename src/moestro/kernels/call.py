"""One call of a fused bank: what its forward and its backward both need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.kernels.activate import FUSED
from moestro.kernels.arguments import Arguments
from moestro.kernels.matrices import Matrices
from moestro.kernels.plan import ROUNDINGS, Chunk, make_plan, most_rows
from moestro.kernels.rows import picked


def kept_shape(given: Arguments) -> tuple[int, int]:
    """Of the pre-activations that a backward needs: `[rows, hidden]`, twice as wide with a gate."""
    pairs = (given.x if given.token is None else given.token).shape[0]  # len() would make a number of a symbol
    rows = most_rows(pairs, given.up.shape[0], ROUNDINGS[given.rounding])
    return rows, given.up.shape[2] + (0 if given.gate is None else given.gate.shape[2])


class Call:
    """The plan and the maps of one call, `y = C F(D x)` with `F = outer(act(inner(rows)))`."""

    def __init__(self, given: Arguments) -> None:
        self.given = given
        self.threads = torch.get_num_threads()
        self.plan = make_plan(given.offsets, ROUNDINGS[given.rounding], self.threads)
        self.inner = Matrices((given.gate, given.up), (given.gate_bias, given.up_bias), given.x.dtype)
        self.outer = Matrices((given.down,), (given.down_bias,), given.x.dtype)
        self.activation = FUSED[given.activation]
        self.width, self.hidden = given.x.shape[1], given.down.shape[1]
        assert self.inner.columns == self.hidden * (1 + self.activation.gated), "gate and up do not fit down"
        self.source = self.plan.source if given.token is None else self.plan.spread(given.token)

    def rows(self, chunk: Chunk, into: Tensor) -> Tensor:
        """The chunk's rows of x."""
        return picked(self.given.x, self.source, chunk, into)

    def halves(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of a chunk's inner rows; twice the same without a gate."""
        return inner[:, : self.hidden], inner[:, -self.hidden :]

    def activate(self, chunk: Chunk, inner: Tensor, act: Tensor, out: Tensor) -> None:
        """`act(gate)` into `act` and its product with `up` into `out`; without a gate `act(up)` into `out`."""
        gate, up = self.halves(inner)
        if not self.activation.gated:
            act = out
        chunk.rowwise(self.activation.forward, gate, act)
        if self.activation.gated:
            torch.mul(act, up, out=out)

    def combine(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """Rows as pairs, or their weighted sum per token in the order of its choices."""
        given = self.given
        if given.order is None or given.starts is None:
            y = self.plan.collect(rows)
            return y if weight is None else y * weight.unsqueeze(1).to(y.dtype)
        if not len(given.order):
            return rows.new_zeros(len(given.x), self.width)
        scale = None if weight is None else weight.index_select(0, given.order).to(rows.dtype)
        places = self.plan.place_of(given.order)
        return F.embedding_bag(places, rows, given.starts, mode="sum", per_sample_weights=scale)
