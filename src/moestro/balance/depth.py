"""The loss that teaches a router to guess who will be picked, where picking looks at later tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moestro.balance.loss import TokenMean
from moestro.routing import Decision


class DepthLoss(TokenMean):
    """Binary cross entropy of each valid token's guess against whether it was picked; 0 where nobody picks.

    Raposo et al. 2024, section 3.5; with a guess for every expert their mean
    """

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision of another kind of router."""
        guess, picked = decision.notes.get("guess"), decision.notes.get("picked")
        if guess is None or picked is None:
            raise ValueError(
                "this loss needs the guesses of a mixture-of-depths router or a predictor, but there are none"
            )
        each = F.binary_cross_entropy_with_logits(guess, picked.to(guess.dtype), reduction="none")
        return each if each.dim() == 1 else each.mean(1)


depth_loss = DepthLoss()
