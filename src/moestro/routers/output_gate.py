"""A gate that judges experts by what they answer, not by what they are asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.base import Router, context_notes
from moestro.routing import Context, Decision, SparseRouting
from moestro.routing.context import group_by_sequence


class OutputGate(Router):
    """Weighs experts by a linear gate on all of their outputs, once per sequence.

        z = flatten(LN(f_1(x)), ..., LN(f_E(x))) . e,   g = softmax(z / tau)        Wu et al. 2024 (MoLE), eqs. 4-6

    Every expert runs here first, and again in the layer: costs twice the experts. Without a fixed length the
    outputs are averaged over the sequence's tokens before the gate. Sees later tokens: not causal.

    Args:
        experts: those of the layer; the gate looks at them, it does not own them.
        num_experts: number of experts.
        width: model width.
        length: tokens of every sequence, for the paper's gate over all of them; None = average.

    Parameters: gate `[experts, length * experts * width]` and temperature tau (1).

    Raises:
        ValueError: at call, sequences of another length.
    """

    causal = False
    active: Tensor

    def __init__(self, experts: nn.Module, num_experts: int, width: int, length: int | None = None) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that its parameters are not counted as the router's
        self.num_experts = self.top_k = num_experts
        self.length = length
        features = (length or 1) * num_experts * width
        self.gate = nn.Parameter(torch.randn(num_experts, features) * features**-0.5)
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("active", torch.ones(num_experts, dtype=torch.bool))

    def look_at(self, experts: nn.Module) -> None:
        """Judge these experts from now on: the layer's, where they are replaced."""
        self._experts = (experts,)

    def keep(self, experts: Sequence[int]) -> None:
        """Use only these experts from now on; their weights are renormalised, nothing is retrained.

        Raises:
            ValueError: no expert, or one that there is not.
        """
        if not experts or not all(0 <= e < self.num_experts for e in experts):
            raise ValueError(f"keep one or more of the experts 0 to {self.num_experts - 1}, got {list(experts)}")
        self.active.zero_()
        self.active[list(experts)] = True

    def decide(self, x: Tensor, context: Context) -> Decision:
        token, present, group = group_by_sequence(context.sequence, context.valid, len(x), x.device)
        outputs = F.layer_norm(self._outputs(x), x.shape[1:])[token]  # [sequences, length, experts, width]
        outputs = outputs * present[..., None, None]
        if self.length is None:
            features = outputs.sum(1).flatten(1) / present.sum(1, keepdim=True).clamp(min=1)
        elif len(token) and token.shape[1] != self.length:
            raise ValueError(f"this gate reads sequences of {self.length} tokens, got {token.shape[1]}")
        else:
            features = outputs.flatten(1)
        logits = features @ self.gate.t().to(x.dtype) / self.temperature.to(x.dtype)
        probs = logits.masked_fill(~self.active, -torch.inf).softmax(-1)[group]
        served = self.active.expand_as(probs)
        served = served if context.valid is None else served & context.valid.unsqueeze(1)
        routing = SparseRouting.from_matrix(probs, served)
        return Decision(routing, logits[group], probs, context_notes(context))

    def _outputs(self, x: Tensor) -> Tensor:
        """Every expert on every token, `[tokens, experts, width]`."""
        experts = self._experts[0]
        dtype = next(experts.parameters()).dtype
        offsets = torch.arange(self.num_experts + 1, device=x.device) * len(x)
        rows = experts(x.to(dtype).repeat(self.num_experts, 1), offsets)
        outputs: Tensor = rows.to(x.dtype).view(self.num_experts, *x.shape).transpose(0, 1)
        return outputs

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, length={self.length}"
