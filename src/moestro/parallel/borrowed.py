"""A bank that runs with weights which are not its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.func import functional_call


class Borrowed:
    """A bank of stacked experts, run with other weights than its own.

    Args:
        bank: a module, or what this made of one.
        weights: by the names of its parameters.
        sizes: attributes of the bank that are others with these weights, e.g. `num_experts`.
    """

    def __init__(self, bank: Any, weights: Mapping[str, Tensor], **sizes: int) -> None:
        self.weights = dict(weights)
        self.bank: Any = copy.copy(bank.bank if isinstance(bank, Borrowed) else bank)
        for name, size in sizes.items():
            setattr(self.bank, name, size)

    def __call__(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = functional_call(self.bank, self.weights, (rows, offsets))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bank, name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights with their names."""
        yield from self.weights.items()

    def parameters(self) -> Iterator[Tensor]:
        """The weights."""
        yield from self.weights.values()
