"""Compare a layer's routing with a slow one written from a paper: weights, losses and router gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.layers import MoE
from moestro.routing import Context, Decision

Slow = Callable[[Tensor, Mapping[str, Tensor]], tuple[list[dict[int, Tensor]], Mapping[str, Tensor]]]


def lively(method: str, num_experts: int = 8, width: int = 6, seed: int = 0, **options: object) -> MoE:
    """A float64 layer whose parameters are all drawn anew."""
    moe = moestro.build(method, width=width, hidden=3, num_experts=num_experts, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return moe


def tokens(count: int = 12, width: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best(values: Tensor, k: int) -> list[int]:
    """Positions of the k largest values, best first, the lowest position among equals."""
    values = values.detach()
    return sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:k]


def share(z: Tensor) -> Tensor:
    """Softmax, written out."""
    e = torch.exp(z - z.detach().max())
    return e / e.sum()


def counts_times_probability(probs: list[Tensor], chosen: list[list[int]], divisor: float) -> Tensor:
    """E sum_i f_i P_i with f_i = count_i / divisor."""
    num_experts, out = len(probs[0]), torch.zeros((), dtype=torch.float64)
    for i in range(num_experts):
        f = sum(each.count(i) for each in chosen) / divisor
        out = out + num_experts * f * sum(p[i] for p in probs) / len(probs)
    return out


def same_routing(moe: MoE, slow: Slow, x: Tensor | None = None, context: Context | None = None) -> Decision:
    """Assert that the layer routes, weighs, loses and differentiates as `slow` does.

    `slow(x, parameters)` answers one {expert: weight} per token and the losses by name.
    """
    x = tokens() if x is None else x
    decision = moe.route(x, context)
    decision.routing.check()
    copies = {name: p.detach().clone().requires_grad_() for name, p in moe.router.named_parameters()}
    rows, losses = slow(x, copies)
    zero = torch.zeros((), dtype=torch.float64)
    matrix = torch.stack([torch.stack([row.get(i, zero) for i in range(moe.router.num_experts)]) for row in rows])
    ours = decision.routing.combine_matrix()
    assert_close(ours, matrix, rtol=1e-12, atol=1e-12)
    probe = torch.sin(torch.arange(matrix.numel(), dtype=torch.float64)).view_as(matrix)
    fast_total, slow_total = (ours * probe).sum(), (matrix * probe).sum()
    assert sorted(moe.losses) == sorted(losses)
    for n, (name, (_, loss)) in enumerate(moe.losses.items()):
        value = loss(decision)
        assert_close(value.double(), losses[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        fast_total, slow_total = fast_total + (n + 0.5) * value, slow_total + (n + 0.5) * losses[name]
    fast = torch.autograd.grad(fast_total, list(moe.router.parameters()), allow_unused=True)
    true = torch.autograd.grad(slow_total, list(copies.values()), allow_unused=True)
    for name, a, b in zip(copies, fast, true, strict=True):
        a, b = (torch.zeros_like(copies[name]) if g is None else g for g in (a, b))
        assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}")
    return decision
