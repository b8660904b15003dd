"""Gates: logits to scores, elementwise or over the experts."""

from __future__ import annotations

from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the experts. Shapes: `[tokens, experts]` -> `[tokens, experts]`, rows sum to 1."""
    return logits.softmax(-1)


def sigmoid(logits: Tensor) -> Tensor:
    """Logistic function of each logit; experts do not compete. Shapes: `[tokens, experts]` -> the same."""
    return logits.sigmoid()
