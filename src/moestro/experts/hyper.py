"""Experts joined by an adapter that a small network makes from those a token did not choose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moestro.experts.base import Experts
from moestro.experts.single import FeedForward
from moestro.routing import Routing, SparseRouting


class HyperNetwork(nn.Module):
    """Makes an adapter from an embedding and the layer's own.

        c = W2 relu(W1 q),   h = relu(W [c; layer]),   D, b_D, U, b_U = linear heads of h
        Zhao et al. 2024, eqs. 5-8

    Args:
        width: model width.
        size: of embeddings.
        hidden: of the network.
        rank: of the adapter.

    Shapes: q `[sets, size]` -> D `[sets, width, rank]`, b_D `[sets, rank]`, U `[sets, rank, width]`, b_U
    `[sets, width]`. Heads start within `1e-3 sqrt(3 / (hidden * inputs))`, inputs those of the part they make.
    """

    def __init__(self, width: int, size: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.shapes = ((width, rank), (rank,), (rank, width), (width,))
        self.first = nn.Parameter(torch.randn(size, size) * size**-0.5)
        self.second = nn.Parameter(torch.randn(size, size) * size**-0.5)
        self.mix = nn.Parameter(torch.randn(2 * size, hidden) * (2 * size) ** -0.5)
        self.heads = nn.ParameterList()
        for shape in self.shapes:
            inputs = shape[0] if len(shape) == 2 else 1
            bound = 1e-3 * (3 / (hidden * inputs)) ** 0.5
            self.heads.append(nn.Parameter(torch.empty(hidden, *shape).uniform_(-bound, bound)))

    def forward(self, q: Tensor, layer: Tensor) -> list[Tensor]:
        c = (q @ self.first).relu() @ self.second
        h = (torch.cat([c, layer.expand(len(c), -1)], 1) @ self.mix).relu()
        # matrix products, because autocast leaves a tensordot of mixed precision as it is
        return [(h @ head.flatten(1)).unflatten(1, head.shape[1:]) for head in self.heads]


class HyperExperts(Experts):
    """A bank, plus an adapter keyed by the experts that a token did not choose.

        q_t = sum over experts not chosen of embedding_e
        y_t = sum_e a_e f_e(x_t) + U' relu(D' x_t + b_D) + b_U        Zhao et al. 2024 (HyperMoE), eqs. 4-9

    Tokens of equal choices share an adapter. A token that no expert takes gets none. Share one `network` among the
    layers of a model by assigning it.

    Args:
        inner: the bank.
        size: of embeddings of experts and of the layer.
        hidden: of the hypernetwork.
        rank: of adapters.

    Raises:
        ValueError: at run, a routing that does not choose.
    """

    def __init__(self, inner: Experts, size: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.inner, self.num_experts, self.width = inner, inner.num_experts, inner.width
        self.embedding = nn.Parameter(torch.randn(inner.num_experts, size))
        self.layer = nn.Parameter(torch.randn(size))
        self.network = HyperNetwork(inner.width, size, hidden, rank)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = self.inner(rows, offsets)
        return out

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        if not isinstance(routing, SparseRouting):
            raise ValueError("a hypernetwork needs a router that chooses experts, not one that mixes")
        y = self.inner.run(x, routing)
        chosen = torch.zeros(len(x), self.num_experts, dtype=torch.bool, device=x.device)
        chosen[routing.token, routing.expert] = True
        sets, own = (~chosen).unique(dim=0, return_inverse=True)
        down, down_bias, up, up_bias = self.network(sets.to(self.embedding.dtype) @ self.embedding, self.layer)
        hidden = (torch.einsum("tw,twr->tr", x, down[own]) + down_bias[own]).relu()
        adapted = torch.einsum("tr,trw->tw", hidden, up[own]) + up_bias[own]
        return y + adapted.to(y.dtype) * chosen.any(1, keepdim=True)

    def replace_bank(self, make: Callable[[Experts], Experts]) -> HyperExperts:
        self.inner = self.inner.replace_bank(make)
        return self

    def parameters_per_expert(self) -> int:
        return self.inner.parameters_per_expert()

    def dense(self, multiple: int = 1) -> FeedForward:
        return self.inner.dense(multiple)
