"""A bank in float64, one expert after the other on all tokens that chose it: quick enough for large cases."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from oracles.experts import GATED, PLAIN
from torch import Tensor


@dataclass(frozen=True)
class RandomLayer:
    """A random layer. `ways` is how many experts are in use at all, the others have no rows."""

    tokens: int
    num_experts: int
    k: int
    ways: int
    width: int
    hidden: int
    activation: str
    bias: bool
    dtype: torch.dtype


def check_layer(
    found: Mapping[str, Tensor | None],
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    keep: Tensor | None,
    parameters: Mapping[str, Tensor],
    activation: str,
    upstream: Tensor,
    tolerance: float,
) -> None:
    """Assert that `y` and the gradients of `x`, `weight [tokens, k]` and each parameter are those of the loop.

    Entry by entry within `tolerance` of its size, and exactly zero where no expert reaches.
    """
    exact = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    rows, share = (each.detach().double().requires_grad_() for each in (x, weight))
    kept = share if keep is None else share * keep
    combine = torch.zeros(len(x), len(exact["up"]), dtype=torch.float64).scatter(1, index, kept)
    upstream = upstream.double()
    y = run_bank(rows, combine, exact, activation)
    inputs = {"x": rows, "weight": share, **exact}
    gradients = torch.autograd.grad(y, list(inputs.values()), upstream, allow_unused=True)
    size = sizes(rows, combine, exact, activation, upstream, tolerance)
    size["weight"] = size["combine"].gather(1, index)
    for name, want in {"y": y, **dict(zip(inputs, gradients, strict=True))}.items():
        _check_close(
            name, found[name], torch.zeros_like(inputs[name]) if want is None else want, tolerance, size[name]
        )


def _check_close(name: str, found: Tensor | None, want: Tensor, tolerance: float, size: Tensor) -> None:
    found, want = (torch.zeros_like(want) if found is None else found).detach().double(), want.detach()
    assert found.isfinite().all(), name
    off, allowed = (found - want).abs(), tolerance * torch.maximum(size, want.abs())
    worst = int((off - allowed).argmax()) if off.numel() else 0
    assert not (off > allowed).any(), (
        f"{name}[{worst}] is {off.flatten()[worst]} off, {allowed.flatten()[worst]} allowed"
    )


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


def sizes(
    x: Tensor, combine: Tensor, weights: Mapping[str, Tensor], activation: str, upstream: Tensor, tolerance: float
) -> dict[str, Tensor]:
    """How large every entry of y and of its gradients would be if no sum in it cancelled.

    The size of a sum is the root of its terms' summed squares or, if larger, its own magnitude; that of a product
    is the product of the sizes. Rounding errs by a share of each term, independently: that much of the size remains
    also where the sum itself is nearly nothing. Which side of relu's kink a pre-activation lies on is not known
    within a fifth of the tolerance; what such a unit passes on may be there or not, so its size is 1 / tolerance
    times as large.

    Returns: `y`, `x`, `combine [tokens, experts]`, and of each weight by its name.
    """
    named = {"y": x, "x": x, "combine": combine, **weights}
    with torch.no_grad():
        found = {name: torch.zeros_like(value) for name, value in named.items()}
        for e in range(combine.shape[1]):
            chosen = torch.nonzero(combine[:, e])[:, 0]
            mine = {name: value[e] for name, value in weights.items()}
            given = x[chosen], combine[chosen, e, None], mine, activation, upstream[chosen]
            rows, shares = _squares(*given, tolerance)
            found["combine"][chosen, e] = rows.pop("combine")
            for name, value in rows.items():
                found[name].index_add_(0, chosen, value)
            for name, value in shares.items():
                found[name][e] = value
        return {name: value.sqrt() for name, value in found.items()}


def _squares(
    x: Tensor, combine: Tensor, weights: Mapping[str, Tensor], activation: str, upstream: Tensor, tolerance: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Squared sizes at one expert: of each row, and of the weights. combine is `[rows, 1]`."""
    squares = {name: value.square() for name, value in weights.items()}
    bias = squares.get("down_bias", x.new_zeros(1))
    up = _square_of_sum(x, weights["up"], weights.get("up_bias"))
    gate = torch.ones_like(up)
    if activation in GATED:
        gate = _square_of_sum(x, weights["gate"], weights.get("gate_bias"))
    squared = activation == "squared_relu"
    hidden = gate * up * (up if squared else 1)  # |act(z)| <= |z|, z^2 for the latter
    d_hidden = _square_of_sum(upstream, weights["down"].t(), None)
    kinked = torch.zeros_like(up, dtype=torch.bool)
    if activation == "relu":
        kinked = (x @ weights["up"] + weights.get("up_bias", 0)).square() <= up * (tolerance / 5) ** 2
    combine, x, upstream = combine.square(), x.square(), upstream.square()
    d_inner = combine * d_hidden * (4 * up if squared else 1) * torch.where(kinked, tolerance**-2, 1.0)
    inner = {"up": d_inner * gate} | ({"gate": d_inner * up} if activation in GATED else {})
    rows = {
        "y": combine * (hidden @ squares["down"] + bias),
        "combine": (d_hidden * hidden).sum(1) + (upstream * bias).sum(1),
        "x": sum((value @ squares[name].t() for name, value in inner.items()), torch.zeros_like(x)),
    }
    shares = {name: x.t() @ value for name, value in inner.items()}
    shares["down"] = (combine * hidden).t() @ upstream
    sums = {name: value.sum(0) for name, value in inner.items()} | {"down": (combine * upstream).sum(0)}
    return rows, shares | {f"{name}_bias": value for name, value in sums.items() if f"{name}_bias" in weights}


def _square_of_sum(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The squared size of `x weight + bias`."""
    bias = x.new_zeros(1) if bias is None else bias
    return torch.maximum(x.square() @ weight.square() + bias.square(), (x @ weight + bias).square())
