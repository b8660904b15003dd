"""The key-value cache of generation: memory laid out once, filled from the left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """What one attention layer remembers: two tensors `[batch, max_length, ...]` and how much of them is filled.

    Grouped-query attention keeps keys and values; latent attention keeps the latents and the rotated key.
    """

    first: Tensor
    second: Tensor
    length: int = 0

    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions and return all stored ones.

        Shapes: `[batch, new, ...]` twice -> `[batch, length + new, ...]` twice.
        """
        end = self.length + first.shape[1]
        self.first[:, self.length : end] = first
        self.second[:, self.length : end] = second
        self.length = end
        return self.first[:, :end], self.second[:, :end]


class KeyValueCache:
    """One `LayerCache` for each layer of a model.

    Args:
        shapes: for each layer, the sizes of one position in its two tensors.
        batch: sequences.
        max_length: positions to make room for.
    """

    def __init__(
        self,
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]],
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        def empty(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(batch, max_length, *shape, dtype=dtype, device=device)

        self.batch, self.max_length = batch, max_length
        self.layers = [LayerCache(empty(first), empty(second)) for first, second in shapes]

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length

    @property
    def num_bytes(self) -> int:
        return sum(layer.first.nbytes + layer.second.nbytes for layer in self.layers)
