"""Weighing rules: scores of the chosen experts to combine weights."""

from __future__ import annotations

from dataclasses import dataclass

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
