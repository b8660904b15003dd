"""The stacked bank that an activation's name asks for."""

from __future__ import annotations

import torch

from moestro.experts.activations import is_gated
from moestro.experts.glu import GLU
from moestro.experts.mlp import MLP
from moestro.experts.single import FeedForward


def make_experts(
    num_experts: int,
    width: int,
    hidden: int,
    activation: str = "swiglu",
    bias: bool = False,
    kernel: str = "auto",
    recompute: bool = False,
) -> GLU | MLP:
    """A `GLU` for gated activations, an `MLP` for plain ones.

    Raises:
        ValueError: a size below one, an unknown activation or an unknown kernel.
    """
    for name, size in (("num_experts", num_experts), ("width", width), ("hidden", hidden)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    bank = GLU if is_gated(activation) else MLP
    return bank(num_experts, width, hidden, activation, bias, kernel, recompute)


def bank_of_one(network: FeedForward) -> GLU | MLP:
    """A dense network as a bank of one expert, in the memory of its weights."""
    with torch.device("meta"):
        bank = make_experts(1, network.width, network.hidden, network.activation, network.bias)
    state = {name: parameter.detach().unsqueeze(0) for name, parameter in network.named_parameters()}
    bank.load_state_dict(state, assign=True)
    return bank
