"""Hash tables for fixed routing: which expert serves which key. Built once, from a seed or from counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_table(num_keys: int, num_experts: int, seed: int = 42) -> Tensor:
    """Every key goes to a uniformly random expert. `[keys]` int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_experts, (num_keys,), generator=generator)


def balanced_table(frequencies: Sequence[float], num_experts: int) -> Tensor:
    """Greedy bin packing: keys by falling frequency, each to the least loaded expert so far. `[keys]` int64.

    The loads differ by at most the count of the most frequent key (Roller et al. 2021, section 3.1).
    """
    counts = torch.as_tensor(frequencies, dtype=torch.float64)
    table, load = torch.empty(len(counts), dtype=torch.long), [0.0] * num_experts
    for key in counts.argsort(descending=True, stable=True).tolist():
        expert = min(range(num_experts), key=load.__getitem__)
        table[key], load[expert] = expert, load[expert] + float(counts[key])
    return table


def dispersed_table(clusters: Sequence[int], num_experts: int) -> Tensor:
    """Spreads the members of each cluster evenly over the experts: similar keys apart. `[keys]` int64.

    The opposite, similar keys together, is the cluster index itself used as the table.
    """
    cluster = torch.as_tensor(clusters, dtype=torch.long)
    table = torch.empty_like(cluster)
    order = cluster.argsort(stable=True)
    table[order] = torch.arange(len(cluster)) % num_experts
    return table
