"""Several banks side by side as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from moestro.experts.base import Experts, Piece


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

    def share(self, experts: Sequence[int]) -> ConcatExperts:
        runs = groupby((self._place(expert) for expert in experts), key=lambda place: place[0])
        return ConcatExperts([self._bank(bank).share([expert for _, expert in run]) for bank, run in runs])

    def parameters_of(self, expert: int) -> dict[str, Piece]:
        bank, expert = self._place(expert)
        return self._bank(bank).parameters_of(expert)

    def _place(self, expert: int) -> tuple[int, int]:
        """The bank of an expert, and which one of that bank it is."""
        for bank, size in enumerate(self.sizes):
            if expert < size:
                return bank, expert
            expert -= size
        raise IndexError(f"there are {self.num_experts} experts")

    def _bank(self, bank: int) -> Experts:
        return cast(Experts, self.banks[bank])
