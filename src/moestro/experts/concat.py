"""Several banks side by side as one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from moestro.experts.base import Experts


class ConcatExperts(Experts):
    """Banks of different kinds as one bank: the experts of the first come first.

    Args:
        banks: of one width.

    Raises:
        ValueError: no bank, or banks of different widths.
    """

    def __init__(self, banks: Iterable[Experts]) -> None:
        super().__init__()
        banks = list(banks)
        self.banks = nn.ModuleList(banks)
        self.sizes = [bank.num_experts for bank in banks]
        widths = {bank.width for bank in banks}
        if len(widths) != 1:
            raise ValueError(f"banks must share one width, got {sorted(widths) or 'no bank'}")
        self.width = widths.pop()
        self.num_experts = sum(self.sizes)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        done, first = [], 0
        for bank, size in zip(self.banks, self.sizes, strict=True):
            bounds = offsets[first : first + size + 1]
            start, stop = int(bounds[0]), int(bounds[-1])
            done.append(bank(rows[start:stop], bounds - start))
            first += size
        dtype = reduce(torch.promote_types, (piece.dtype for piece in done))
        return torch.cat([piece.to(dtype) for piece in done])

    def merged(self, mixture: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Banks of different kinds have no common parameters to mix: always ValueError."""
        raise ValueError("a concatenation of banks cannot be merged; use one bank of one kind")
