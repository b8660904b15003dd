"""The non-linearities of experts, by the field's names."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, So et al. 2021 (Primer)."""
    return F.relu(x).square()


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = (*GATED, *PLAIN)


def is_gated(activation: str) -> bool:
    """Whether the name stands for a gated unit (three matrices) or a plain one (two).

    Raises:
        ValueError: for a name that is neither.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    return activation in GATED
