"""The non-linearities of a fused bank, writing into given memory, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An element-wise function with its derivative.

    Attributes:
        forward: (z, out) -> None.
        backward: (gradient, z, out) -> None: the gradient times the derivative at z.
        gated: whether it belongs to a gated unit, `act(gate) * up`.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    gated: bool = False


def _relu(z: Tensor, out: Tensor) -> object:
    return torch.clamp(z, min=0, out=out)


def _relu_backward(grad: Tensor, z: Tensor, out: Tensor) -> object:
    return _aten.threshold_backward.grad_input(grad, z, 0, grad_input=out)


def _squared_relu(z: Tensor, out: Tensor) -> object:
    return _relu(z, out).square_()  # type: ignore[attr-defined]


def _squared_relu_backward(grad: Tensor, z: Tensor, out: Tensor) -> object:
    return torch.mul(grad, z.clamp(min=0).mul_(2), out=out)


SILU = Activation(
    lambda z, out: _aten.silu.out(z, out=out),
    lambda grad, z, out: _aten.silu_backward.grad_input(grad, z, grad_input=out),
)
GELU = Activation(
    lambda z, out: _aten.gelu.out(z, out=out),
    lambda grad, z, out: _aten.gelu_backward.grad_input(grad, z, grad_input=out),
)
FUSED: dict[str, Activation] = {
    "swiglu": replace(SILU, gated=True),
    "geglu": replace(GELU, gated=True),
    "silu": SILU,
    "gelu": GELU,
    "relu": Activation(_relu, _relu_backward),
    "squared_relu": Activation(_squared_relu, _squared_relu_backward),
}
