"""What the sets of experts that tokens chose say: who works together, who follows whom, how few do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Tokens in a row that learn, or test, the prediction of the next layer."""


def coactivation(chosen: Tensor) -> Tensor:
    """How many times more often two experts serve the same token than blind choices of the same loads would.

        lift[a, b] = n_ab / m_ab        m_ab = n_a n_b · (Σ_{c ≠ d} n_cd) / (Σ_{c ≠ d} n_c n_d)

    The factor makes blind choices score 1: a token never chooses the same expert twice, so that even without any
    preference, two experts meet less often than `n_a n_b / tokens`. The diagonal, and experts without tokens, are
    0.

    Shapes: chosen `[tokens, experts]` bool -> `[experts, experts]` float64.
    """
    both = together(chosen)
    load = both.diagonal().clone()
    blind = (load.unsqueeze(1) * load).fill_diagonal_(0.0)
    both.fill_diagonal_(0.0)
    expected = blind * (both.sum() / blind.sum().clamp_min(1e-300))
    return torch.where(expected > 0, both / expected.clamp_min(1e-300), 0.0)


def together(chosen: Tensor) -> Tensor:
    """Tokens that chose both of two experts, `[experts, experts]`; the diagonal is the load."""
    return _count(chosen, chosen)


def coverage(load: Sequence[float]) -> list[float]:
    """The share of the choices that the N busiest experts serve, for N = 1, 2 ... experts."""
    ordered = torch.tensor(load, dtype=torch.float64).sort(descending=True).values
    return [float(value) for value in ordered.cumsum(0) / ordered.sum().clamp_min(1e-300)]


def experts_for(covered: Sequence[float], share: float) -> int:
    """The least number of experts that together serve this share of the choices."""
    return next((count for count, value in enumerate(covered, 1) if value >= share - 1e-9), len(covered))


def next_layer(chosen: Tensor, following: Tensor) -> dict[str, float] | None:
    """How well a token's experts in one layer tell its experts in the next, as a prefetching cache would guess.

        score[t, f] = Σ_{e chosen by t} n_ef / n_e        guess the m best f, m being the mean number of experts

    Counts `n` come from every other 64 tokens, the answer is measured on the rest.

    Args:
        chosen, following: of the same tokens.

    Returns:
        `recall`, the share of the next layer's choices that were guessed; `recall_by_load`, the same if the busiest
        experts are always guessed; `chance`, if guesses are blind. None with fewer than two blocks of tokens.

    Shapes: chosen `[tokens, experts]`, following `[tokens, experts of the next layer]`, both bool.
    """
    learns = torch.arange(len(chosen)) // BLOCK % 2 == 0
    if len(chosen) != len(following) or bool(learns.all()) or not following[~learns].any():
        return None
    counts = _count(chosen[learns], following[learns])
    load, busy = chosen[learns].sum(0).double(), following[learns].sum(0).double()
    score = chosen[~learns].double() @ (counts / load.clamp_min(1).unsqueeze(1))
    guesses = min(max(round(float(following.sum() / len(following))), 1), following.shape[1])
    return {
        "guesses": guesses,
        "recall": _recall(score + 1e-9 * busy / busy.sum(), following[~learns], guesses),
        "recall_by_load": _recall(busy.expand(len(score), -1), following[~learns], guesses),
        "chance": guesses / following.shape[1],
    }


def busiest(load: Sequence[float], most: int) -> list[int]:
    """The `most` experts with the highest load, in order of their number."""
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
    return sorted(order[:most])


def top_pairs(matrix: Tensor, count: int) -> list[list[Any]]:
    """`[a, b, value]` of the highest entries above the diagonal, highest first."""
    a, b = torch.triu_indices(len(matrix), len(matrix), offset=1)
    picked = matrix[a, b].argsort(descending=True, stable=True)[:count].tolist()
    return [[int(a[i]), int(b[i]), round(float(matrix[a[i], b[i]]), 4)] for i in picked]


def _count(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows.float().T @ columns.float()).double()  # exact below 2^24 tokens


def _recall(score: Tensor, following: Tensor, guesses: int) -> float:
    guessed = torch.zeros_like(following).scatter(1, score.topk(guesses, dim=1).indices, True)
    return float((guessed & following).sum() / following.sum())
