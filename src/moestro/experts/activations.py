"""The non-linearities of experts, by the field's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, So et al. 2021 (Primer)."""
    return F.relu(x).square()


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU with bounded inputs, a steeper sigmoid and one added to the other factor, OpenAI 2025 (gpt-oss).

    (clamp(u, -7, 7) + 1) * g * sigmoid(1.702 g),   g = min(gate, 7)
    """
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = (*GATED, *PLAIN)  # those that fused operators have
UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "clamped_swiglu": clamped_swiglu,
}


def is_gated(activation: str) -> bool:
    """Whether the name stands for a gated unit (three matrices) or a plain one (two).

    Raises:
        ValueError: for a name that is neither.
    """
    if activation not in (*UNITS, *PLAIN):
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join((*UNITS, *PLAIN))}")
    return activation in UNITS
