"""Routing by dense matrices: every slot reads a mixture of a sequence's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftRouting:
    """Slots that read weighted sums of tokens, and tokens that read weighted sums of slots.

    Block-diagonal by sequence, hence kept as one batch of small matrices: `groups` sequences, each padded
    to `length` places and read by the same number of slots per expert.

        u = D x,   y = C F(u)        Puigcerver et al. 2023, section 2

    Attributes:
        token: token at each place, `[groups, length]` int64 (0 at padding, whose weights are zero).
        dispatch_weight: `[groups, experts, slots, length]`; sums to 1 over the places of a sequence.
        combine_weight: `[groups, length, experts, slots]`; in Soft MoE it sums to 1 over experts and slots.
        num_tokens: tokens of the call.
    """

    token: Tensor
    dispatch_weight: Tensor
    combine_weight: Tensor
    num_tokens: int

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.dispatch_weight.shape[1]

    @property
    def offsets(self) -> Tensor:
        """Rows of expert e are `offsets[e]:offsets[e + 1]`, `[experts + 1]`: as many for each."""
        groups, num_experts, slots, _ = self.dispatch_weight.shape
        return torch.arange(num_experts + 1, device=self.token.device) * (groups * slots)

    def dispatch(self, x: Tensor) -> Tensor:
        """Slot inputs: `x [tokens, width]` -> `[experts * groups * slots, width]`, grouped by expert."""
        if not self.token.numel():
            return x.new_zeros(0, x.shape[1]) + 0 * x.sum()
        places = x[self.token]  # [groups, length, width]
        rows = torch.einsum("gesl,glw->egsw", self.dispatch_weight.to(x.dtype), places)
        return rows.flatten(0, 2)

    def combine(self, rows: Tensor) -> Tensor:
        """Mixtures of slot outputs: `rows [experts * groups * slots, width]` -> `[tokens, width]`."""
        groups, num_experts, slots, _ = self.dispatch_weight.shape
        rows = rows.view(num_experts, groups, slots, rows.shape[-1])
        places = torch.einsum("gles,egsw->glw", self.combine_weight.to(rows.dtype), rows)
        y = rows.new_zeros(self.num_tokens, rows.shape[-1])
        return y.index_add(0, self.token.flatten(), places.flatten(0, 1))

    def load(self) -> Tensor:
        """Combine weight that each expert receives over all tokens, `[experts]` float."""
        return self.combine_weight.sum(dim=(0, 1, 3))

    def combine_matrix(self) -> Tensor:
        """Combine weights summed over an expert's slots, `[tokens, experts]`."""
        weight = self.combine_weight.sum(-1).flatten(0, 1)
        matrix = weight.new_zeros(self.num_tokens, self.num_experts)
        return matrix.index_add(0, self.token.flatten(), weight)

    def check(self) -> None:
        """Raise ValueError if the shapes disagree or a slot reads more than one token's worth."""
        groups, num_experts, slots, length = self.dispatch_weight.shape
        if self.combine_weight.shape != (groups, length, num_experts, slots):
            raise ValueError(
                f"combine_weight must be {[groups, length, num_experts, slots]} to match dispatch_weight, "
                f"got {list(self.combine_weight.shape)}"
            )
        if self.token.shape != (groups, length):
            raise ValueError(f"token must be {[groups, length]}, got {list(self.token.shape)}")
        if bool((self.dispatch_weight.sum(-1) > 1 + 1e-3).any()):
            raise ValueError("the dispatch weights of a slot must sum to at most 1")
