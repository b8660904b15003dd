"""Weighing rules: scores of the chosen experts to combine weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.routing import Selection


def as_is(logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
    """The scores of the chosen experts, unchanged. Shapes: `[tokens, experts]` -> `[tokens, k]`.

    The only choice for k = 1: a renormalised single weight is always 1 and gives the router no gradient.
    """
    return probs.gather(1, chosen.index)


def softmax_over_selected(logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
    """Softmax over the chosen logits only. Shapes: `[tokens, experts]` -> `[tokens, k]`, rows sum to 1."""
    return logits.gather(1, chosen.index).softmax(-1)


def sigmoid_of_selected(logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
    """Logistic function of the chosen logits (Lewis et al. 2021). Shapes: `[tokens, experts]` -> `[tokens, k]`."""
    return logits.gather(1, chosen.index).sigmoid()


@dataclass(frozen=True)
class Scaled:
    """The scores of the chosen experts times a constant (DeepSeek-AI 2024, V2: 16).

    Attributes:
        scale: the constant.
    """

    scale: float

    def __call__(self, logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
        """Shapes: `[tokens, experts]` -> `[tokens, k]`."""
        return self.scale * probs.gather(1, chosen.index)


@dataclass(frozen=True)
class Normed:
    """The chosen scores divided by their q-norm.

        a = s / (sum_j |s_j|^q)^(1/q)        Databricks 2024 (DBRX), q = 1: weights sum to 1

    Attributes:
        q: order of the norm.

    Raises:
        ValueError: an order that is not above 0.
    """

    q: float

    def __post_init__(self) -> None:
        if self.q <= 0:
            raise ValueError(f"norm={self.q} must be above 0; 1 makes the weights sum to one")

    def __call__(self, logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
        """Shapes: `[tokens, experts]` -> `[tokens, k]`."""
        weight = probs.gather(1, chosen.index)
        return weight / torch.linalg.vector_norm(weight, self.q, dim=-1, keepdim=True)


@dataclass(frozen=True)
class Renormalised:
    """The chosen scores divided by their sum, times a constant.

        a_i = scale * s_i / (sum_j s_j + epsilon)

    Dropped choices still count in the sum: renormalising after a drop is another method.

    Attributes:
        scale: what the weights of a token sum to.
        epsilon: keeps the quotient finite.
    """

    scale: float = 1.0
    epsilon: float = 1e-20

    def __call__(self, logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
        """Shapes: `[tokens, experts]` -> `[tokens, k]`."""
        weight = probs.gather(1, chosen.index)
        return self.scale * weight / (weight.sum(-1, keepdim=True) + self.epsilon)


def renormalised_where_several(logits: Tensor, probs: Tensor, chosen: Selection) -> Tensor:
    """Scores divided by their sum where a token has several experts, unchanged where it has one.

    A single weight of 1 would give the router no gradient. Shapes: `[tokens, experts]` -> `[tokens, k]`.
    """
    weight = probs.gather(1, chosen.index)
    if chosen.keep is None:
        return weight / weight.sum(-1, keepdim=True) if chosen.k > 1 else weight
    several = chosen.keep.sum(-1, keepdim=True) > 1
    return weight / (weight * chosen.keep).sum(-1, keepdim=True).where(several, 1)
