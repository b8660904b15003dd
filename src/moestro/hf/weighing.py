"""How the routers of transformers turn logits and choices into combine weights, one rule per family.

Replay needs it: with somebody else's choices the weights must come from this model's own logits, or the router
would receive no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Weigh = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]


def softmax(logits: Tensor) -> Tensor:
    """Scores that sum to one over the experts, in float32 or better."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def sigmoid(logits: Tensor) -> Tensor:
    """Scores of each expert by itself, in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


@dataclass(frozen=True)
class Weighing:
    """Gate, gather, perhaps normalise, perhaps scale.

        w = gate(logits)[chosen];   w / max(sum w + epsilon, floor);   w * scale

    Attributes:
        gate: logits -> scores.
        normalised: whether weights sum to one, or the router's attribute that says so.
        epsilon: added to the sum.
        floor: the router's attribute with the least sum, if it has one.
        scale: the router's attribute with a factor, if it has one.
        among_chosen: gate the chosen logits alone (always normalised).
    """

    gate: Callable[[Tensor], Tensor] = softmax
    normalised: bool | str = False
    epsilon: float = 0.0
    floor: str | None = None
    scale: str | None = None
    among_chosen: bool = False

    def __call__(self, router: nn.Module, logits: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        """Shapes: logits `[tokens, experts]`, index `[tokens, k]` -> weights `[tokens, k]`."""
        if self.among_chosen:
            return self.gate(logits.gather(1, index))
        weight = self.gate(logits).gather(1, index)
        if self.sums_to_one(router):
            total = weight.sum(-1, keepdim=True) + self.epsilon
            weight = weight / (total if self.floor is None else total.clamp(min=getattr(router, self.floor)))
        return weight if self.scale is None else weight * getattr(router, self.scale)

    def sums_to_one(self, router: Any) -> bool:
        """Whether weights are normalised over the chosen experts, before the scale."""
        if self.among_chosen:
            return True
        if isinstance(self.normalised, str):
            return bool(getattr(router, self.normalised))
        return self.normalised


@dataclass(frozen=True)
class SparseMixerWeighing:
    """PhiMoE: each choice is weighed among the experts whose logits are near the best one left.

    w_1 = softmax(s where (max s - s) / max(|s|, max s) <= 2 epsilon)[chosen_1];   w_2 the same without chosen_1
    Liu et al. 2023 (SparseMixer) as in Abdin et al. 2024; training samples and estimates the gradient otherwise
    """

    def __call__(self, router: Any, logits: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        first = self._weight(router, logits, logits, index[:, :1])
        rest = logits.scatter(1, index[:, :1], -torch.inf)
        return torch.cat([first, self._weight(router, logits, rest, index[:, 1:])], dim=1)

    def _weight(self, router: Any, logits: Tensor, left: Tensor, chosen: Tensor) -> Tensor:
        with torch.no_grad():
            best = left.gather(1, chosen)  # a replayed choice need not be the live maximum
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * router.router_jitter_noise
        return left.masked_fill(far, -torch.inf).softmax(-1).gather(1, chosen)

    def sums_to_one(self, router: Any) -> bool:
        return False


@dataclass(frozen=True)
class TopTwoGates:
    """NLLB: the two probabilities, normalised before or after tokens are dropped."""

    def __call__(self, router: Any, logits: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        weight = softmax(logits).gather(1, index)
        if keep is not None and not router.normalize_router_prob_before_dropping:
            weight = weight * keep
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).eps)
        return weight if keep is None else weight * keep

    def sums_to_one(self, router: Any) -> bool:
        return True
