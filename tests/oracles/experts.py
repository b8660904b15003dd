"""Slow expert banks, written out: one token, one expert at a time.

A bank is a list of dicts of weights, one dict per expert, with the keys `gate`, `up`, `down` (each
[in, out], so that a row is multiplied from the left) and optional `gate_bias`, `up_bias`, `down_bias`.
Nothing here comes from the library; everything is plain torch, so autograd gives the gradients.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def silu(z: Tensor) -> Tensor:
    return z * sigmoid(z)


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def relu(z: Tensor) -> Tensor:
    return z * (z > 0)


def squared_relu(z: Tensor) -> Tensor:
    return z * z * (z > 0)


GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": silu, "geglu": gelu}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu, "gelu": gelu, "silu": silu, "squared_relu": squared_relu,
}  # fmt: skip


def linear(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row [in] times weight [in, out], as a sum over the inputs."""
    out = row.new_zeros(weight.shape[1])
    for i in range(weight.shape[0]):
        out = out + row[i] * weight[i]
    return out if bias is None else out + bias


def feed_forward(row: Tensor, weights: Weights, activation: str) -> Tensor:
    """One row [width] through one expert; gated activations multiply act(gate) by up."""
    up = linear(row, weights["up"], weights.get("up_bias"))
    if activation in GATED:
        inner = GATED[activation](linear(row, weights["gate"], weights.get("gate_bias"))) * up
    else:
        inner = PLAIN[activation](up)
    return linear(inner, weights["down"], weights.get("down_bias"))


def split_bank(stacked: Weights) -> list[dict[str, Tensor]]:
    """Stacked weights {name: [experts, ...]} as a list of experts; slices keep the graph."""
    num_experts = next(iter(stacked.values())).shape[0]
    return [{name: value[e] for name, value in stacked.items()} for e in range(num_experts)]


def functions(bank: Iterable[Weights], activation: str) -> list[Callable[[Tensor], Tensor]]:
    """Every expert as a function of one row."""
    return [lambda row, weights=weights: feed_forward(row, weights, activation) for weights in bank]


def run_sparse(x: Tensor, combine: Tensor, bank: list[Weights], activation: str) -> Tensor:
    """y_t = sum_e combine[t, e] f_e(x_t), over the non-zero entries of combine [tokens, experts]."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for e, weights in enumerate(bank):
            if combine[t, e] != 0:
                y = y + combine[t, e] * feed_forward(x[t], weights, activation)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def run_sparse_on_inputs(x: Tensor, combine: Tensor, bank: list[Weights], activation: str) -> Tensor:
    """y_t = sum_e f_e(combine[t, e] x_t): the weight multiplies what goes in."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for e, weights in enumerate(bank):
            if combine[t, e] != 0:
                y = y + feed_forward(combine[t, e] * x[t], weights, activation)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def run_soft(
    x: Tensor, dispatch: Tensor, combine: Tensor, owner: list[int], bank: list[Weights], activation: str
) -> Tensor:
    """y_t = sum_s combine[t, s] f_owner(s)(sum_u dispatch[s, u] x_u), slot by slot."""
    outputs = []
    for slot, expert in enumerate(owner):
        row = torch.zeros_like(bank[0]["up"][:, 0])
        for u in range(x.shape[0]):
            row = row + dispatch[slot, u] * x[u]
        outputs.append(feed_forward(row, bank[expert], activation))
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for slot, output in enumerate(outputs):
            y = y + combine[t, slot] * output
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def merge(bank: list[Weights], mixture: Tensor) -> dict[str, Tensor]:
    """One virtual expert: theta = sum_e mixture[e] theta_e, weights and biases alike."""
    merged = {}
    for name in bank[0]:
        total = torch.zeros_like(bank[0][name])
        for e, weights in enumerate(bank):
            total = total + mixture[e] * weights[name]
        merged[name] = total
    return merged
