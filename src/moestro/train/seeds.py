"""Seeds of everything that a run draws from."""

from __future__ import annotations

import random

import numpy as np
import torch
import xxhash


def stream(seed: int, step: int, process: int) -> int:
    """The seed of what a process draws in a step."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{process}".encode()) >> 1


def seed_everything(seed: int) -> None:
    """Seed every generator that a method might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
