"""The deep mixture of experts of 2013: dense layers of experts, each with a gate that may not run away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.balance.overload import CountCarried
from moestro.experts import AffineExperts
from moestro.layers import MoE
from moestro.routers.gate_networks import TwoLayer
from moestro.routers.overload import OverloadGuard
from moestro.routing import Decision


class DeepMixtureOfExperts(nn.Module):
    """Stacked dense mixtures of one-layer experts, and a linear map to the outputs.

        z_l = sum_i g_i(z_{l-1}) relu(W_i z_{l-1} + b_i),   g = softmax(B relu(A z + a) + b);   W z_L + b
        Eigen, Ranzato & Sutskever 2013, eqs. 1-4

    In the first phase of training an expert whose running total of gate weight leads the mean by more than a
    margin is left out (section 3); then the gates are free. A mixture in two layers of E experts has E² paths.

    Args:
        width: inputs.
        outputs: classes; the softmax is left to the loss.
        num_experts: of each layer.
        hidden: outputs of an expert, for each layer.
        gate_hidden: hidden units of the gate, for each layer.
        margin: lead that an expert may have, in minibatches; inf = no constraint. The paper gives none.
        constrained_steps: minibatches of the first phase; None = until `lift_constraint`.

    Shapes: x `[..., width]` -> `[..., outputs]`.

    Raises:
        ValueError: settings for different numbers of layers.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        num_experts: Sequence[int] = (4, 4),
        hidden: Sequence[int] = (100, 100),
        gate_hidden: Sequence[int] = (50, 50),
        *,
        margin: float = 10.0,
        constrained_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not len(num_experts) == len(hidden) == len(gate_hidden) > 0:
            raise ValueError(
                f"num_experts={tuple(num_experts)}, hidden={tuple(hidden)} and gate_hidden={tuple(gate_hidden)} "
                "describe different numbers of layers; give one entry per layer to each"
            )
        self.layers = nn.ModuleList()
        for experts, size, gate in zip(num_experts, hidden, gate_hidden, strict=True):
            router = OverloadGuard(TwoLayer(width, experts, gate), margin, constrained_steps)
            self.layers.append(MoE(router, AffineExperts(experts, width, size, link="relu")))
            width = size
        self._counter = CountCarried()
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            decisions: list[Decision] = []
            x = layer(x, decisions=decisions)
            if self.training and len(x):
                assert isinstance(layer, MoE)
                self._counter.update(layer, self._counter.measure(decisions[0]))
        y: Tensor = self.output(x)
        return y

    def gate_proba(self, x: Tensor) -> list[Tensor]:
        """Gate probabilities of each layer, `[tokens, experts]`, without the constraint and without gradient.

        Shapes: x `[tokens, width]`.
        """
        training = self.training
        self.eval()
        gates = []
        with torch.no_grad():
            for layer, router in zip(self.layers, self._routers(), strict=True):
                gates.append(router.scorer(x).softmax(-1))
                x = layer(x)
        self.train(training)
        return gates

    def lift_constraint(self) -> None:
        """Begin the second phase: every expert may be used as much as its gate likes."""
        for router in self._routers():
            router.margin = math.inf

    def _routers(self) -> list[OverloadGuard]:
        return [module for module in self.modules() if isinstance(module, OverloadGuard)]
