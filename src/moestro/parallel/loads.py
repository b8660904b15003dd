"""Histories of what experts had to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Load = np.ndarray | Sequence[Sequence[float]]  # [steps, experts], tokens or shares of them


def load_table(history: Load) -> np.ndarray:
    """A history as float64 `[steps, experts]`; ValueError for what is none."""
    table = np.asarray(history, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"a history of loads is [steps, experts] with at least one step, got {list(table.shape)}")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("loads must be finite and not negative; pass counts of tokens or shares of them")
    return table


def load_shares(history: Load) -> np.ndarray:
    """Each expert's share of each step, `[steps, experts]`; 0 in a step without tokens."""
    table = load_table(history)
    return table / np.maximum(table.sum(1, keepdims=True), 1e-300)
