"""The two losses of a router that teaches a lighter one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moestro.balance.counts import chosen_by, facts
from moestro.balance.loss import Sums, TokenLoss, TokenMean
from moestro.routing import Decision


class SignedOverload(TokenLoss):
    """Presses the scores of overloaded experts down and of idle ones up; 0 once the lighter router decides.

    mean over tokens of ((n_e - n) / n) sigmoid(s[t, e]),   e the expert of t, n_e its load, n = T / E
    Dai et al. 2022, eq. 4; the paper sums over tokens, beside a summed task loss
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, counted = facts(decision)
        chosen = chosen_by(choice[:, :1], counted[:, :1], probs.shape[1], probs.dtype)
        return {"chosen": chosen, "own": probs * chosen * ("taught" in decision.notes)}

    def value(self, sums: Sums) -> Tensor:
        load = sums["chosen"]
        excess = load / load.mean(-1, keepdim=True).clamp(min=1e-9) - 1
        return (excess * sums["own"]).sum(-1) / sums["tokens"].clamp(min=1)


class Distillation(TokenMean):
    """Cross entropy of the lighter router against the choices of the first; 0 once it decides itself.

    mean over tokens of -log softmax(s')[argmax s]        Dai et al. 2022, eq. 6 (a sum there)
    """

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, _ = facts(decision)
        taught = decision.notes.get("taught")
        if taught is None:
            return probs.sum(-1) * 0
        return F.cross_entropy(taught, choice[:, 0], reduction="none")


signed_overload = SignedOverload()
distillation = Distillation()
