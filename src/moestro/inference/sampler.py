"""Choosing the next token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor


class Sampler:
    """Draws tokens from softmax(logits / temperature), cut to the smallest set that holds `top_p` of the mass.

    Holtzman et al. 2020 (nucleus sampling). Temperature 0 is greedy: the highest logit, the lowest id at ties.

    Args:
        temperature: 0 = greedy; above 1 flatter, below 1 sharper.
        top_p: probability mass to keep, above 0 and at most 1 = all.
        seed: of the draws.

    Raises:
        ValueError: a negative temperature, or top_p outside (0, 1].
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}; pass 0 for greedy or a positive number")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}; pass a number above 0 and at most 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token. Shapes: logits `[vocab_size]`."""
        logits = logits.float().cpu()
        if self.temperature == 0:
            return int(logits.argmax())
        probs = torch.softmax(logits / self.temperature, dim=-1)
        return int(torch.multinomial(self._nucleus(probs), 1, generator=self.generator))

    def _nucleus(self, probs: Tensor) -> Tensor:
        """Probabilities outside the nucleus set to zero; the token that crosses `top_p` belongs to it."""
        if self.top_p == 1:
            return probs
        ordered, index = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        return torch.zeros_like(probs).scatter(0, index, ordered.where(before < self.top_p, 0.0))
