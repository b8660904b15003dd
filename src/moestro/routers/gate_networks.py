"""Scorers of classical mixtures: affine, two-layer, tree-shaped and by densities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.scorers import Scorer
from moestro.routing.context import NO_CONTEXT, Context


class Affine(Scorer):
    """One matrix and a bias: `logits = x W + b`.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; weight `[experts, width]` from normal(0, std), bias zero.
    """

    def __init__(self, width: int, num_experts: int, std: float = 0.02) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width) * std)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class TwoLayer(Scorer):
    """A network with one hidden layer: `logits = W2 relu(W1 x + b1) + b2`        Eigen et al. 2013, eq. 2

    Shapes: x `[tokens, width]` -> `[tokens, experts]`.
    """

    def __init__(self, width: int, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.inner = Affine(width, hidden, width**-0.5)
        self.outer = Affine(hidden, num_experts, hidden**-0.5)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        logits: Tensor = self.outer(self.inner(x).relu())
        return logits


class Tree(Scorer):
    """Two levels of affine gates whose softmax is the product of theirs.

        logits[b, l] = log softmax_b(x V + a) + log softmax_l(x W_b + c_b)        Jordan and Jacobs 1994 (HME)

    Experts are numbered branch by branch.

    Args:
        width: model width.
        num_experts: leaves of all branches.
        branches: gates at the second level.

    Raises:
        ValueError: branches that do not divide the experts.
    """

    def __init__(self, width: int, num_experts: int, branches: int) -> None:
        super().__init__()
        if branches < 1 or num_experts % branches:
            raise ValueError(f"branches={branches} does not divide {num_experts} experts; choose a divisor")
        self.num_experts, self.branches = num_experts, branches
        self.top, self.leaf = Affine(width, branches), Affine(width, num_experts)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        top = self.top(x).log_softmax(-1).unsqueeze(-1)
        leaf = self.leaf(x).unflatten(1, (self.branches, -1)).log_softmax(-1)
        return (top + leaf).flatten(1)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, branches={self.branches}"


class Densities(Scorer):
    """A Gaussian per expert: the softmax of the logits is the posterior of the mixture (generative gate).

        logits[e] = log alpha_e + log N(x | m_e, S_e),   S_e^-1 = L_e' L_e        Xu, Jordan and Hinton 1994

    Parameters: log_alpha `[experts]` zero, mean `[experts, width]` normal, factor `[experts, width, width]` zero,
    of which the lower triangle is L's and the diagonal the logarithm of L's.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.log_alpha = nn.Parameter(torch.zeros(num_experts))
        self.mean = nn.Parameter(torch.randn(num_experts, width))
        self.factor = nn.Parameter(torch.zeros(num_experts, width, width))

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        log_alpha, mean, factor = (p.to(x.dtype) for p in (self.log_alpha, self.mean, self.factor))
        diagonal = factor.diagonal(dim1=1, dim2=2)
        lower = factor.tril(-1) + torch.diag_embed(diagonal.exp())
        away = torch.einsum("euw,tew->teu", lower, x.unsqueeze(1) - mean)
        constant = log_alpha + diagonal.sum(-1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return constant - 0.5 * away.square().sum(-1)
