"""How alike experts are: in their weights, and in what they answer to the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moestro.inspect.chosen import busiest, top_pairs

MOST = 64
"""Experts of a layer whose matrices are written out: the busiest ones."""


def cosines(parts: Iterable[Tensor]) -> Tensor | None:
    """Cosine similarity of experts, whose parts come one after another.

        cos[a, b] = <a, b> / (|a| |b|)    over all parts together; 0 for an expert that is all zero

    None without parts. Hidden units in another order look unlike here, though they compute the same: see
    `output_cosines`.

    Shapes: parts `[experts, ...]` each -> `[experts, experts]` float64.
    """
    gram: Tensor | None = None
    for part in parts:
        for piece in part.detach().flatten(1).split(1 << 16, dim=1):
            rows = piece.double().cpu()
            gram = rows @ rows.T if gram is None else gram + rows @ rows.T
    if gram is None:
        return None
    length = gram.diagonal().sqrt()
    return gram / (length.unsqueeze(1) * length).clamp_min(1e-300)


def output_cosines(outputs: Tensor) -> Tensor:
    """Mean over tokens of the cosine similarity of what experts answer to the same token.

    Shapes: outputs `[experts, tokens, width]` -> `[experts, experts]` float64.
    """
    unit = torch.nn.functional.normalize(outputs.detach().double().cpu(), dim=-1)
    return torch.einsum("atw,btw->ab", unit, unit) / max(outputs.shape[1], 1)


def similarity(matrix: Tensor, load: list[float]) -> dict[str, Any]:
    """A similarity matrix in plain numbers: the mean of pairs, the closest pairs, the busiest experts' part."""
    count = len(matrix)
    experts = busiest(load[:count], MOST)  # experts without weights of their own come last
    others = matrix.sum() - matrix.diagonal().sum()
    return {
        "mean": float(others / max(count * (count - 1), 1)),
        "closest": top_pairs(matrix, 10),
        "experts": experts,
        "matrix": rounded(matrix[experts][:, experts]),
    }


def rounded(matrix: Tensor) -> list[list[float]]:
    """Four digits of each number."""
    return [[float(f"{value:.4g}") for value in row] for row in matrix.tolist()]
