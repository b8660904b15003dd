"""The two losses of a router that teaches a lighter one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moestro.balance.counts import chosen_load, valid_tokens
from moestro.routing import Decision


def signed_overload(decision: Decision) -> Tensor:
    """Presses the scores of overloaded experts down and of idle ones up; 0 once the lighter router decides.

    mean over tokens of ((n_e - n) / n) sigmoid(s[t, e]),   e the expert of t, n_e its load, n = T / E
    Dai et al. 2022, eq. 4; the paper sums over tokens, beside a summed task loss
    """
    probs, taught = decision.probs, decision.notes.get("taught")
    assert probs is not None
    if taught is None:
        return probs.sum() * 0
    choice, valid = decision.notes["choice"][:, 0], valid_tokens(decision, len(probs))
    load = chosen_load(decision).to(probs.dtype)
    excess = load / load.mean().clamp(min=1e-9) - 1
    own = probs.gather(1, choice.unsqueeze(1)).squeeze(1)
    return (excess[choice] * own * valid).sum() / valid.sum().clamp(min=1)


def distillation(decision: Decision) -> Tensor:
    """Cross entropy of the lighter router against the choices of the first; 0 once it decides itself.

    mean over tokens of -log softmax(s')[argmax s]        Dai et al. 2022, eq. 6 (a sum there)
    """
    probs, taught = decision.probs, decision.notes.get("taught")
    assert probs is not None
    if taught is None:
        return probs.sum() * 0
    valid = valid_tokens(decision, len(probs))
    each = F.cross_entropy(taught, decision.notes["choice"][:, 0], reduction="none")
    return (each * valid).sum() / valid.sum().clamp(min=1)
