"""One dense feed-forward network: the layer an MoE replaces, and the shared expert beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.experts.activations import PLAIN, UNITS, is_gated
from moestro.kernels import as_autocast


class FeedForward(nn.Module):
    """A dense feed-forward network with the formula of one expert.

        gated: (act(x W_gate) * (x W_up)) W_down        plain: act(x W_up) W_down

    Args:
        width: model width.
        hidden: hidden size.
        activation: `swiglu`, `geglu`, `relu`, `gelu`, `silu` or `squared_relu`.
        bias: whether the maps add one.

    Shapes: `[..., width]` -> `[..., width]`; gate (gated only) and up `[width, hidden]`, down `[hidden, width]`.
    """

    def __init__(self, width: int, hidden: int, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.width, self.hidden, self.activation, self.bias = width, hidden, activation, bias
        gated = is_gated(activation)
        self.gate = nn.Parameter(torch.empty(width, hidden)) if gated else None
        self.up = nn.Parameter(torch.empty(width, hidden))
        self.down = nn.Parameter(torch.empty(hidden, width))
        self.gate_bias = nn.Parameter(torch.empty(hidden)) if gated and bias else None
        self.up_bias = nn.Parameter(torch.empty(hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw weights from normal(0, std), by default 1/sqrt(inputs); biases become zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, std or parameter.shape[0] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        up = _linear(x, self.up, self.up_bias)
        if self.gate is None:
            hidden = PLAIN[self.activation](up)
        else:
            hidden = UNITS[self.activation](_linear(x, self.gate, self.gate_bias), up)
        return _linear(hidden, self.down, self.down_bias)

    def extra_repr(self) -> str:
        return f"width={self.width}, hidden={self.hidden}, activation={self.activation!r}, bias={self.bias}"


class GatedFeedForward(nn.Module):
    """A shared expert scaled by a learned sigmoid gate.

        y = sigmoid(x w) f(x)        Qwen1.5-MoE 2024

    Shapes: `[..., width]` -> `[..., width]`; weight `[width, 1]`, zero at the start: a gate of one half.
    """

    def __init__(self, inner: FeedForward) -> None:
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.zeros(inner.width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.weight) * self.inner(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x @ weight
    return x if bias is None else x + bias.to(x.dtype)
