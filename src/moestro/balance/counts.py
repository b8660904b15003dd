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


def chosen_by(choice: Tensor, counted: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """How often each token chose each expert, `[tokens, experts]`; choice and counted `[tokens, k]`."""
    matrix = torch.zeros(len(choice), num_experts, dtype=dtype, device=choice.device)
    return matrix.scatter_add(1, choice, counted.to(dtype))


def chosen_load(decision: Decision) -> Tensor:
    """Choices per expert before any drop, without padding, `[experts]`; the routing's load if none are noted."""
    choice = decision.notes.get("choice")
    if choice is None:
        return decision.routing.load().detach()
    return count(choice, counted_choices(decision, choice), decision.routing.num_experts, torch.long)


def chosen_and_dropped(decision: Decision) -> tuple[Tensor, Tensor]:
    """Choices that valid tokens made, and how many of them a capacity dropped; both 0 if none are noted."""
    choice = decision.notes.get("choice")
    if choice is None:
        nothing = decision.routing.offsets.new_zeros(())
        return nothing, nothing
    made = counted_choices(decision, choice)
    kept = decision.notes.get("kept", made)
    return made.sum(), (made & ~kept).sum()


def facts(decision: Decision) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities `[tokens, experts]`, choices and which of them count, both `[tokens, k]`, or ValueError."""
    choice = noted(decision, "choice")
    return probs_of(decision), choice, counted_choices(decision, choice)


def probs_of(decision: Decision) -> Tensor:
    """Probabilities `[tokens, experts]`, or ValueError."""
    if decision.probs is None:
        raise ValueError("this loss needs router probabilities, but this router has none")
    return decision.probs


def logits_of(decision: Decision) -> Tensor:
    """Logits `[tokens, experts]`, or ValueError."""
    if decision.logits is None:
        raise ValueError("this loss needs logits, but this router has none")
    return decision.logits


def noted(decision: Decision, name: str) -> Tensor:
    """A note of the decision, or ValueError saying which one is missing."""
    if name not in decision.notes:
        raise ValueError(f"this loss needs the decision's {name!r}, which only token-choice routers note")
    return decision.notes[name]
