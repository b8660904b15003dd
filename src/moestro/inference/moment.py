"""What the layers of a model need to know about the token that is being decoded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moestro.models import DecoderLM
from moestro.routing import Context, Decision


@dataclass(frozen=True)
class Moment:
    """One token of one sequence.

    Attributes:
        position: its place.
        rotary: cosine and sine of the model's tables there, `[1, 1, rotary_dim / 2]`.
        cosine: the same for both halves of a head, `[rotary_dim]` float32.
        sine: likewise.
        context: for routers.
        decisions: of the layers before, for routers that read them; only the last is kept.
    """

    position: int
    rotary: tuple[Tensor, Tensor]
    cosine: Tensor
    sine: Tensor
    context: Context
    decisions: list[Decision] = field(default_factory=list)

    @classmethod
    def of(cls, model: DecoderLM, token: int, position: int, domain: int | None) -> Moment:
        rotary = model.rotary(position, 1)
        cosine, sine = (torch.cat([half, half], dim=-1).float().view(-1) for half in rotary)
        context = Context(
            token_ids=torch.tensor([token]),
            sequence=torch.zeros(1, dtype=torch.long),
            position=torch.tensor([position]),
            domain=None if domain is None else torch.tensor([domain]),
        )
        return cls(position, rotary, cosine, sine, context)
