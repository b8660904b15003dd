"""The loss that trains a gate of autoencoders."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.balance.loss import TokenMean
from moestro.routing import Decision


@dataclass(frozen=True)
class Reconstruction(TokenMean):
    """Mean error of each token's own autoencoder, that of its domain: the others are left as they are.

        mean over tokens of |v_t - r_domain(t)(v_t)|^2 = -temperature * logits[t, domain(t)]
        Aljundi et al. 2017, eq. 1

    Attributes:
        temperature: of the gate.
    """

    temperature: float

    def each(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without logits or domains."""
        domain, logits = decision.notes.get("domain"), decision.logits
        if domain is None or logits is None:
            raise ValueError(
                "autoencoders train on the tokens of their own task: call the layer with Context(domain=...)"
            )
        own = domain.where(valid_tokens(decision, len(logits)), 0)
        return -self.temperature * logits.gather(1, own.unsqueeze(1)).squeeze(1)
