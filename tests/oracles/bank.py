"""A bank in float64, one expert after the other on all tokens that chose it: quick enough for large cases."""

from collections.abc import Mapping

import torch
from oracles.experts import GATED, PLAIN
from torch import Tensor


def run_bank(x: Tensor, combine: Tensor, weights: Mapping[str, Tensor], activation: str) -> Tensor:
    """y = sum_e combine[:, e] f_e(x), for combine `[tokens, experts]` and stacked weights, all float64."""
    y = torch.zeros_like(x)
    for e in range(combine.shape[1]):
        chosen = torch.nonzero(combine[:, e])[:, 0]
        share = torch.zeros(len(x), len(chosen), dtype=x.dtype)
        share[chosen, torch.arange(len(chosen))] = combine[chosen, e]
        y = y + share @ _expert(x[chosen], {name: value[e] for name, value in weights.items()}, activation)
    return y


def _expert(rows: Tensor, weights: Mapping[str, Tensor], activation: str) -> Tensor:
    up = rows @ weights["up"] + weights.get("up_bias", 0)
    if activation in GATED:
        inner = GATED[activation](rows @ weights["gate"] + weights.get("gate_bias", 0)) * up
    else:
        inner = PLAIN[activation](up)
    return inner @ weights["down"] + weights.get("down_bias", 0)
