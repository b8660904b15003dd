"""A gate that starts dense and becomes sparse as it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.routers.base import Router, context_notes
from moestro.routers.scorers import Scorer
from moestro.routing import Context, Decision, SparseRouting, top_k


@dataclass(frozen=True)
class CosineTemperature:
    """A temperature that falls along half a cosine.

        tau(t) = last + (first - last) (1 + cos(pi t / steps)) / 2, then last        Nie et al. 2021, released code

    Attributes:
        first: temperature at step 0.
        last: temperature from step `steps` on.
        steps: length of the descent.

    Raises:
        ValueError: a temperature that is not above 0, or no steps.
    """

    first: float = 2.0
    last: float = 0.3
    steps: int = 10_000

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.last > 0 and self.steps > 0):
            raise ValueError(f"temperatures and steps must be above 0, got {self}")

    def __call__(self, step: int) -> float:
        """The temperature at a step."""
        done = min(step / self.steps, 1.0)
        return self.last + 0.5 * (self.first - self.last) * (1 + math.cos(math.pi * done))


class DenseToSparse(Router):
    """A Gumbel softmax of falling temperature, cut off at a threshold; then top-1.

        a = softmax((log softmax(z) + Gumbel) / tau(step));   experts with a > threshold serve, with weight a
        Nie et al. 2021 (EvoMoE), section 4.2; weights are not renormalised

    From step `tau.steps` on, and in evaluation: the best expert, weighted by its softmax score.

    Args:
        scorer: x -> logits.
        threshold: smallest weight that still serves.
        temperature: schedule of tau over optimiser steps.

    Attributes:
        step: optimiser steps so far, moved by `moestro.balance.steps.CountSteps`; saved with the weights.
    """

    top_k = 1
    step: Tensor

    def __init__(self, scorer: Scorer, threshold: float, temperature: CosineTemperature) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold} must be at least 0 and below 1")
        self.scorer, self.threshold, self.temperature = scorer, threshold, temperature
        self.num_experts = scorer.num_experts
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @property
    def dense(self) -> bool:
        """Whether this is still the dense phase."""
        return int(self.step) < self.temperature.steps

    def decide(self, x: Tensor, context: Context) -> Decision:
        logits = self.scorer(x, context)
        probs = logits.softmax(-1)
        if self.training and self.dense:
            gumbel = -torch.empty_like(logits).exponential_().log()
            score = ((logits.log_softmax(-1) + gumbel) / self.temperature(int(self.step))).softmax(-1)
            choice = top_k(score, self.num_experts)
            weight = score.gather(1, choice)
            wanted = weight > self.threshold
        else:
            choice = top_k(probs, 1)
            weight = probs.gather(1, choice)
            wanted = torch.ones_like(choice, dtype=torch.bool)
        keep = wanted if context.valid is None else wanted & context.valid.unsqueeze(1)
        routing = SparseRouting.from_choice(choice, weight, self.num_experts, keep)
        notes = {**context_notes(context), "choice": choice, "wanted": wanted, "kept": keep}
        return Decision(routing, logits, probs, notes)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, temperature={self.temperature}"
