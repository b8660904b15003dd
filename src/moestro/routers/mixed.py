"""Routers that share a token out between the routed experts and the shared one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.base import Router
from moestro.routers.wrapped import Wrapped
from moestro.routing import Context, Decision, SparseRouting


class Mixed(Wrapped):
    """Scales the combine weights of a router and notes the weight of the shared expert.

    y = routed(x) * MoE(x) + shared(x) * f_shared(x)
    """

    def decide(self, x: Tensor, context: Context) -> Decision:
        decision: Decision = self.router.decide(x, context)
        routing = decision.routing
        assert isinstance(routing, SparseRouting)
        routed, shared = self.mix(x)
        routing = replace(routing, weight=routing.weight * routed[routing.token])
        return replace(decision, routing=routing, notes={**decision.notes, "shared_weight": shared})

    @abstractmethod
    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the routed and of the shared part, `[tokens, width]` -> `[tokens]` each."""


class SoftmaxMix(Mixed):
    """A softmax of two logits: `c = softmax(x W + b)`; routed gets c_0, shared c_1 (Rajbhandari et al. 2022).

    Args:
        router: the router inside.
        width: model width.

    Shapes: weight `[2, width]`, zero at the start (halves), bias `[2]`.
    """

    def __init__(self, router: Router, width: int) -> None:
        super().__init__(router)
        self.weight, self.bias = nn.Parameter(torch.zeros(2, width)), nn.Parameter(torch.zeros(2))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routed, shared = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).softmax(-1).unbind(-1)
        return routed, shared


class BudgetedMix(Mixed):
    """A gate between shared and routed: `g = dropout(sigmoid(x w + b))`; routed gets g, shared 1 - g.

    NLLB team 2022, section 6.2.2 (conditional MoE routing). Dropout rescales what stays, so that in training g may
    exceed 1, as in the released code. Keep the mean of g at a budget by the `GateBudget` loss.

    Args:
        router: the router inside.
        width: model width.
        dropout: share of tokens that only see the shared expert in training.

    Raises:
        ValueError: a dropout outside 0 to 1.

    Shapes: weight `[1, width]`, zero at the start, bias `[1]`.
    """

    def __init__(self, router: Router, width: int, dropout: float) -> None:
        super().__init__(router)
        if not 0 <= dropout < 1:
            raise ValueError(f"gate_dropout={dropout} must be at least 0 and below 1")
        self.dropout = dropout
        self.weight, self.bias = nn.Parameter(torch.zeros(1, width)), nn.Parameter(torch.zeros(1))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).squeeze(-1).sigmoid()
        gate = F.dropout(gate, self.dropout, self.training)
        return gate, 1 - gate
