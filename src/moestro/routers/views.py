"""What a scorer sees besides, or instead of, the token: its domain, its attributes, its whole sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.gate_networks import Affine
from moestro.routers.ids import ids_of
from moestro.routers.scorers import Scorer
from moestro.routing.context import NO_CONTEXT, Context, group_by_sequence


class SeesDomain(Scorer):
    """Shows a scorer the embedding of the token's domain instead of the token: `logits = scorer(e_domain(t))`

    Tokens of one domain get equal logits        Kudugunta et al. 2021, section 3.1

    Args:
        scorer: reads vectors of `width`.
        width: size of an embedding.
        num_domains: embeddings, normal(0, 1).

    Shapes: x `[tokens, any]` -> `[tokens, experts]`; needs `Context.domain`.
    """

    def __init__(self, scorer: Scorer, width: int, num_domains: int) -> None:
        super().__init__()
        self.scorer, self.num_experts = scorer, scorer.num_experts
        self.embedding = nn.Parameter(torch.randn(num_domains, width))

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        domain = ids_of(context, "domain", len(self.embedding), "routing by task")
        logits: Tensor = self.scorer(self.embedding.to(x.dtype), context)
        return logits[domain]


class SeesBoth(Scorer):
    """Shows a scorer the token and, appended, the embedding of its domain: `logits = scorer([x; e_domain(t)])`

    Args:
        scorer: reads vectors of the model width plus `size`.
        size: of an embedding.
        num_domains: embeddings, zero at the start: a plain router.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; needs `Context.domain`.
    """

    def __init__(self, scorer: Scorer, size: int, num_domains: int) -> None:
        super().__init__()
        self.scorer, self.num_experts = scorer, scorer.num_experts
        self.embedding = nn.Parameter(torch.zeros(num_domains, size))

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        domain = ids_of(context, "domain", len(self.embedding), "routing by token and task")
        logits: Tensor = self.scorer(torch.cat([x, self.embedding.to(x.dtype)[domain]], 1), context)
        return logits


class SeesSequence(Scorer):
    """Shows a scorer the mean of the sequence's valid tokens: one decision per sentence or image; not causal.

    Args:
        scorer: reads vectors of the model width.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`, equal within a sequence.
    """

    causal = False

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer, self.num_experts = scorer, scorer.num_experts

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        token, present, group = group_by_sequence(context.sequence, context.valid, len(x), x.device)
        mean = (x[token] * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.scorer(mean)
        return logits[group]


class SeesAttributes(Scorer):
    """Shows a scorer the token's attributes (modality, task, place ...) and nothing of its content.

        z = LN(Linear(m_t)) W_g,   m_t in {0, 1}^A        Zhu et al. 2022 (Uni-Perceiver-MoE), section 3.2

    Attributes are the bits of `Context.domain`, the lowest first.

    Args:
        scorer: reads vectors of `width`.
        width: size of the embedding.
        num_attributes: A.

    Shapes: x `[tokens, any]` -> `[tokens, experts]`.
    """

    def __init__(self, scorer: Scorer, width: int, num_attributes: int) -> None:
        super().__init__()
        if not 1 <= num_attributes <= 62:
            raise ValueError(f"num_attributes={num_attributes} must be between 1 and 62 bits")
        self.scorer, self.num_experts = scorer, scorer.num_experts
        self.num_attributes = num_attributes
        self.embed = Affine(num_attributes, width, std=num_attributes**-0.5)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        code = ids_of(context, "domain", 2**self.num_attributes, "routing by attributes")
        powers = 2 ** torch.arange(self.num_attributes, device=x.device)  # ONNX has no shift of signed numbers
        bits = code.unsqueeze(1).div(powers, rounding_mode="floor") % 2
        embedded = self.embed(bits.to(x.dtype))
        logits: Tensor = self.scorer(F.layer_norm(embedded, embedded.shape[1:]), context)
        return logits
