"""Banks run densely: every expert on every token, so that no shape depends on who chose whom."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import cast

import torch
from torch import Tensor

from moestro.experts import (
    GLU,
    MLP,
    AffineExperts,
    ConcatExperts,
    ConstantExperts,
    CopyExperts,
    Experts,
    ModuleExperts,
    ZeroExperts,
)
from moestro.experts.activations import PLAIN, UNITS
from moestro.experts.affine import LINKS
from moestro.experts.hyper import HyperExperts
from moestro.routing import Routing, SparseRouting

Form = Callable[[Experts, Tensor], Tensor]


class DenseRun(Experts):
    """A bank whose routings are carried out by a combine matrix.

        y_t = sum_e C[t, e] f_e(x_t)        over all experts; C is zero where a token did not choose

    Costs `experts / k` times the arithmetic of the bank and `experts * tokens * hidden` memory: right for a graph
    that must serve any routing with static shapes, wrong for training.

    Args:
        bank: the experts.

    Raises:
        ValueError: a bank that cannot run densely; at run, a routing in which tokens do not choose.
    """

    def __init__(self, bank: Experts) -> None:
        super().__init__()
        self.bank, self.num_experts, self.width = bank, bank.num_experts, bank.width
        self.parts = [(part, _form_of(part)) for part in _parts(bank)]

    @property
    def out_width(self) -> int:
        return self.bank.out_width

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = self.bank(rows, offsets)
        return out

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        chosen, weight = choices(routing, self.num_experts)
        matrix = (chosen * weight.unsqueeze(2)).sum(1).to(x.dtype)  # [tokens, experts]
        assert isinstance(routing, SparseRouting)
        if routing.scale == "output":
            rows = self._every(x.expand(self.num_experts, -1, -1))
            return torch.einsum("te,etw->tw", matrix.to(rows.dtype), rows)
        rows = self._every(x * matrix.t().unsqueeze(2))
        return torch.einsum("te,etw->tw", chosen.any(1).to(rows.dtype), rows)

    def _every(self, x: Tensor) -> Tensor:
        pieces = x.split([part.num_experts for part, _ in self.parts])
        done = [form(part, rows) for (part, form), rows in zip(self.parts, pieces, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done)

    def parameters_per_expert(self) -> int:
        return self.bank.parameters_per_expert()


class DenseHyper(DenseRun):
    """The same for `HyperExperts`: every token makes its own adapter, of the experts it did not choose."""

    def __init__(self, bank: HyperExperts) -> None:
        super().__init__(bank.inner)
        self.embedding, self.layer, self.network = bank.embedding, bank.layer, bank.network

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        y = super().run(x, routing)
        chosen = choices(routing, self.num_experts)[0].any(1)
        key = (~chosen).to(self.embedding.dtype) @ self.embedding
        down, down_bias, up, up_bias = self.network(key, self.layer)
        hidden = (torch.einsum("tw,twr->tr", x, down) + down_bias).relu()
        adapted = torch.einsum("tr,trw->tw", hidden, up) + up_bias
        return y + adapted.to(y.dtype) * chosen.any(1, keepdim=True)


def dense_run(bank: Experts) -> DenseRun:
    """The bank, run densely."""
    return DenseHyper(bank) if isinstance(bank, HyperExperts) else DenseRun(bank)


def choices(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor]:
    """Which expert each choice went to, none where it was dropped, and its combine weight.

    Shapes: `[tokens, k, experts]` bool and `[tokens, k]`.

    Raises:
        ValueError: a routing in which tokens do not choose experts.
    """
    if not isinstance(routing, SparseRouting) or routing.slot is None:
        raise ValueError(
            "only routers in which every token chooses experts can be exported; "
            "this one lets experts choose tokens, or mixes tokens or parameters"
        )
    slot = routing.slot  # one past the rows where a choice was dropped
    weight = torch.cat([routing.weight, routing.weight.new_zeros(1)])[slot]
    expert = (slot.unsqueeze(2) >= routing.offsets[1:]).sum(2)  # groups that end before the row
    return expert.unsqueeze(2) == torch.arange(num_experts, device=slot.device), weight


@singledispatch
def every_expert(bank: Experts, x: Tensor) -> Tensor:
    """Every expert on rows of its own, equally many for each. Register other kinds of banks here.

    Shapes: x `[experts, rows, width]` -> `[experts, rows, out_width]`.

    Raises:
        ValueError: a bank without such a form.
    """
    raise ValueError(
        f"{type(bank).__name__} cannot be exported: it has no form that runs every expert on every token; "
        "export the model with float GLU or MLP banks, or register one with moestro.export.every_expert"
    )


def _parts(bank: Experts) -> list[Experts]:
    if not isinstance(bank, ConcatExperts):
        return [bank]
    return [part for inner in bank.banks for part in _parts(cast(Experts, inner))]


def _form_of(bank: Experts) -> Form:
    """The function for this kind of bank, found now: compilers do not trace the dispatch."""
    form = every_expert.dispatch(type(bank))
    if form is every_expert.dispatch(object):
        form(bank, torch.empty(0))  # says what is wrong
    return form


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.to(x.dtype)
    return y if bias is None else y + bias.unsqueeze(1).to(y.dtype)


@every_expert.register
def _(bank: GLU, x: Tensor) -> Tensor:
    gate, up = _affine(x, bank.gate, bank.gate_bias), _affine(x, bank.up, bank.up_bias)
    return _affine(UNITS[bank.activation](gate, up), bank.down, bank.down_bias)


@every_expert.register
def _(bank: MLP, x: Tensor) -> Tensor:
    hidden = PLAIN[bank.activation](_affine(x, bank.up, bank.up_bias))
    return _affine(hidden, bank.down, bank.down_bias)


@every_expert.register
def _(bank: AffineExperts, x: Tensor) -> Tensor:
    return LINKS[bank.link](_affine(x, bank.weight, bank.bias))


@every_expert.register
def _(bank: ZeroExperts, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@every_expert.register
def _(bank: CopyExperts, x: Tensor) -> Tensor:
    return x


@every_expert.register
def _(bank: ConstantExperts, x: Tensor) -> Tensor:
    share = (x @ bank.weight.to(x.dtype)).softmax(-1)  # [experts, rows, 2]
    return share[..., :1] * x + share[..., 1:] * bank.vector.unsqueeze(1).to(x.dtype)


@every_expert.register
def _(bank: ModuleExperts, x: Tensor) -> Tensor:
    return torch.stack([expert(x[index]) for index, expert in enumerate(bank.experts)])
