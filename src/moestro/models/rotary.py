"""Rotary position embedding, in the two orders of features that released models use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moestro.models.rope_scaling import rotary_frequencies


class Rotary(nn.Module):
    """Tables of the angles by which rotary attention turns each pair of features.

        angle(position, i) = position * theta^(-2i / width)    Su et al. 2021, eq. 15

    Args:
        width: features to rotate; even.
        max_length: positions in the tables.
        theta: base of the frequencies.
        scaling: for longer sequences than those of pretraining, see `rotary_frequencies`; None = none.

    Shapes: -> cosine and sine `[length, 1, width / 2]`, the 1 for the heads.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, width: int, max_length: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None
    ):
        super().__init__()
        if width % 2:
            raise ValueError(f"rotary positions turn pairs, but the head has {width} features; pass an even number")
        frequency, magnitude = rotary_frequencies(width, theta, scaling)
        angle = torch.outer(torch.arange(max_length).float(), frequency)[:, None]
        self.register_buffer("cos", angle.cos() * magnitude, persistent=False)
        self.register_buffer("sin", angle.sin() * magnitude, persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[start : start + length], self.sin[start : start + length]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature i together with feature i + width / 2 (the order of Llama and its descendants).

    Shapes: x `[batch, length, heads, width]` -> the same.
    """
    first, second = x.chunk(2, dim=-1)
    return _turn(first, second, cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature 2i together with feature 2i + 1 (the order of DeepSeek).

    The result holds the first features of all pairs, then the second ones; queries and keys agree on it.

    Shapes: x `[batch, length, heads, width]` -> the same.
    """
    return _turn(x[..., 0::2], x[..., 1::2], cos, sin)


ROTATIONS = {"halves": rotate_halves, "pairs": rotate_pairs}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, order: str) -> Tensor:
    """Turn the first features of each head, as many as the tables are for; the others stay as they are.

    Args:
        x: `[batch, length, heads, width]`.
        cos: `[length, 1, rotated / 2]`.
        sin: likewise.
        order: which features form a pair: `halves` or `pairs`.
    """
    rotated = 2 * cos.shape[-1]
    turned = ROTATIONS[order](x[..., :rotated], cos, sin)
    return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)


def _turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(first.dtype), sin.to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
