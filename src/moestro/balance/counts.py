"""Which choices count, and how many each expert received."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.routing import Decision


def valid_tokens(decision: Decision, num_tokens: int) -> Tensor:
    """Tokens that are not padding, `[tokens]` bool."""
    valid = decision.notes.get("valid")
    if valid is not None:
        return valid
    return torch.ones(num_tokens, dtype=torch.bool, device=decision.routing.offsets.device)


def counted_choices(decision: Decision, choice: Tensor) -> Tensor:
    """Choices that a selection rule made for valid tokens, before any drop, `[tokens, k]` bool."""
    counted = valid_tokens(decision, len(choice)).unsqueeze(1).expand_as(choice)
    wanted = decision.notes.get("wanted")
    return counted if wanted is None else counted & wanted


def count(choice: Tensor, counted: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Choices per expert, `[experts]`; choice and counted `[tokens, k]`."""
    total = torch.zeros(num_experts, dtype=dtype, device=choice.device)
    return total.scatter_add(0, choice.flatten(), counted.flatten().to(dtype))


def chosen_load(decision: Decision) -> Tensor:
    """Choices per expert before any drop, without padding, `[experts]`; the routing's load if none are noted."""
    choice = decision.notes.get("choice")
    if choice is None:
        return decision.routing.load().detach()
    return count(choice, counted_choices(decision, choice), decision.routing.num_experts, torch.long)


def facts(decision: Decision) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities `[tokens, experts]`, choices `[tokens, k]` and valid tokens `[tokens]`, or ValueError."""
    if decision.probs is None:
        raise ValueError("this loss needs router probabilities, but this router has none")
    return decision.probs, noted(decision, "choice"), valid_tokens(decision, len(decision.probs))


def noted(decision: Decision, name: str) -> Tensor:
    """A note of the decision, or ValueError saying which one is missing."""
    if name not in decision.notes:
        raise ValueError(f"this loss needs the decision's {name!r}, which only token-choice routers note")
    return decision.notes[name]
