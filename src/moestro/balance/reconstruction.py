"""The loss that trains a gate of autoencoders."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.routing import Decision


@dataclass(frozen=True)
class Reconstruction:
    """Mean error of each token's own autoencoder, that of its domain: the others are left as they are.

        mean over tokens of |v_t - r_domain(t)(v_t)|^2 = -temperature * logits[t, domain(t)]
        Aljundi et al. 2017, eq. 1

    Attributes:
        temperature: of the gate.
    """

    temperature: float

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without logits or domains."""
        domain, logits = decision.notes.get("domain"), decision.logits
        if domain is None or logits is None:
            raise ValueError(
                "autoencoders train on the tokens of their own task: call the layer with Context(domain=...)"
            )
        valid = valid_tokens(decision, len(logits))
        own = logits.gather(1, domain.where(valid, 0).unsqueeze(1)).squeeze(1)
        return -self.temperature * (own * valid).sum() / valid.sum().clamp(min=1)
