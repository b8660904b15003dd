"""Linear maps and dense feed-forward networks whose weights are 8-bit or 4-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.experts.bank import bank_of_one
from moestro.experts.quantised import QuantisedExperts, quantise
from moestro.experts.quantised_stack import QuantisedStack, TensorError
from moestro.experts.single import FeedForward


class QuantisedLinear(nn.Module):
    """A linear map with quantised weights, for inference; made by `quantise_linear`.

    Shapes: `[..., in]` -> `[..., out]`.
    """

    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False, *, bits: int = 8, group: int = 64) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = inputs, outputs, bits, group
        self.matrix = QuantisedStack(1, inputs, outputs, bits, group)
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    @classmethod
    def like(cls, linear: nn.Linear, bits: int, group: int) -> QuantisedLinear:
        """Room for the codes of a map."""
        return cls(linear.in_features, linear.out_features, linear.bias is not None, bits=bits, group=group)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.matrix(rows, [(0, 0, len(rows))] if len(rows) else []).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantise_linear(linear: nn.Linear, bits: int = 8, group: int = 64) -> tuple[QuantisedLinear, TensorError]:
    """A linear map in 8 or 4 bits, and how far it is from what it was; see `quantise`."""
    quantised = QuantisedLinear.like(linear, bits, group)
    (error,) = quantised.matrix.fill({"weight": linear.weight.unsqueeze(0).transpose(1, 2)})
    if linear.bias is not None:
        quantised.bias = linear.bias.detach().clone()
    return quantised, error


class QuantisedFeedForward(nn.Module):
    """A dense feed-forward network with quantised weights, for inference: a quantised bank of one expert.

    Shapes: `[..., width]` -> `[..., width]`.
    """

    def __init__(self, bank: QuantisedExperts) -> None:
        super().__init__()
        self.bank, self.bits, self.group = bank, bank.bits, bank.group

    @classmethod
    def like(cls, network: FeedForward, bits: int, group: int) -> QuantisedFeedForward:
        """Room for the codes of a network."""
        sizes = (1, network.width, network.hidden, network.activation, network.bias)
        return cls(QuantisedExperts(*sizes, bits=bits, group=group))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.bank.width)
        return self.bank(rows, torch.tensor([0, len(rows)])).view_as(x)


def quantise_feed_forward(
    network: FeedForward, bits: int = 8, group: int = 64
) -> tuple[QuantisedFeedForward, list[TensorError]]:
    """A dense network in 8 or 4 bits, and how far each tensor is from what it was; see `quantise`."""
    experts, errors = quantise(bank_of_one(network), bits, group)
    return QuantisedFeedForward(experts), errors
