"""The loss that teaches mixture-of-depths to guess who will be picked."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moestro.balance.loss import TokenMean
from moestro.routing import Decision


class DepthLoss(TokenMean):
    """Binary cross entropy of each valid token's guess against whether it was picked    Raposo et al. 2024, 3.5"""

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision of another kind of router."""
        guess, picked = decision.notes.get("guess"), decision.notes.get("picked")
        if guess is None or picked is None:
            raise ValueError(
                "this loss needs the guesses of a mixture-of-depths router, but this router makes none"
            )
        return F.binary_cross_entropy_with_logits(guess, picked.to(guess.dtype), reduction="none")


depth_loss = DepthLoss()
