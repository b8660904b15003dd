"""What some routers need besides the hidden states; every field is optional."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moestro.routing.decision import Decision


@dataclass(frozen=True)
class Context:
    """Facts about the tokens of one call; tensors are flat, one entry per token.

    Attributes:
        token_ids: vocabulary index of every token, `[tokens]` int.
        sequence: which sequence a token belongs to, `[tokens]` int; None = all in one.
        position: place of a token in its sequence, `[tokens]` int.
        valid: False for padding, `[tokens]` bool; padding gets no expert, no output and enters no loss.
        domain: source, language or task of every token, `[tokens]` int.
        device: device that every token lives on, for what prefers its neighbourhood, `[tokens]` int.
        previous: the decision of the layer before.
    """

    token_ids: Tensor | None = None
    sequence: Tensor | None = None
    position: Tensor | None = None
    valid: Tensor | None = None
    domain: Tensor | None = None
    device: Tensor | None = None
    previous: Decision | None = None

    def check(self, num_tokens: int) -> None:
        """Raise ValueError if a field does not have one entry per token."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.shape != (num_tokens,):
                raise ValueError(
                    f"Context.{field.name} has shape {list(value.shape)} but there are {num_tokens} tokens; "
                    f"pass one entry per token, flattened to [{num_tokens}]"
                )

    def need(self, field: str, who: str) -> Tensor:
        """The field, or ValueError saying who needs it and how to pass it."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"{who} needs Context.{field}; call the layer with Context({field}=...)")
        return value

    def num_valid(self, num_tokens: int) -> int:
        """How many of so many tokens are not padding."""
        return num_tokens if self.valid is None else int(self.valid.sum())

    def with_sequences_of(self, x: Tensor) -> Context:
        """Take sequences and positions from the shape of `x` `[batch, length, width]` unless they are given."""
        if self.sequence is not None or x.dim() != 3:
            return self
        batch, length, _ = x.shape
        sequence = torch.arange(batch, device=x.device).repeat_interleave(length)
        position = torch.arange(length, device=x.device).repeat(batch) if self.position is None else self.position
        return replace(self, sequence=sequence, position=position)


NO_CONTEXT = Context()


def home_devices(device: Tensor | None, num_tokens: int, num_devices: int, where: torch.device) -> Tensor:
    """Device of every token, `[tokens]` int64: as given (`Context.device`), or consecutive tokens in equal parts.

    Raises:
        ValueError: a device out of range.
    """
    if device is None:
        return torch.arange(num_tokens, device=where) * num_devices // max(num_tokens, 1)
    if num_tokens and not 0 <= int(device.min()) <= int(device.max()) < num_devices:
        raise ValueError(
            f"Context.device names devices {int(device.min())} to {int(device.max())}, "
            f"but num_devices={num_devices}: pass 0 to {num_devices - 1}"
        )
    return device.long()


def group_by_sequence(
    sequence: Tensor | None, valid: Tensor | None, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay tokens out by sequence, padded to the longest one.

    Returns:
        token: index of each place's token, `[groups, longest]` int64, 0 where there is none.
        present: whether a place holds a valid token, `[groups, longest]` bool.
        group: group of every token, `[tokens]` int64.
    """
    if sequence is None:
        group, counts = torch.zeros(num_tokens, dtype=torch.long, device=device), torch.tensor([num_tokens])
        counts = counts.to(device)[: min(num_tokens, 1)]
    else:
        _, group, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    start = counts.cumsum(0) - counts
    place = torch.arange(num_tokens, device=device) - start[group[order]]
    longest = int(counts.max()) if len(counts) else 0
    token = torch.zeros(len(counts), longest, dtype=torch.long, device=device)
    present = torch.zeros(len(counts), longest, dtype=torch.bool, device=device)
    token[group[order], place] = order
    present[group[order], place] = True if valid is None else valid[order]
    return token, present, group
