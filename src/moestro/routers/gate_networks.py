"""Scorers of classical mixtures: affine, two-layer, tree-shaped and by densities."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate

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
    """A tree of affine gates whose softmax is the product of theirs along the path to a leaf.

        logits[leaf] = sum over nodes v on its path of log softmax_c(x W_v + c_v)[child]    Jordan and Jacobs 1994

    Leaves are numbered from left to right; one level is a softmax gate.

    Args:
        width: model width.
        branching: children of a node, for each level from the root.

    Parameters: `levels`, for each level an affine map to the children of all its nodes.

    Shapes: x `[tokens, width]` -> `[tokens, leaves]`.

    Raises:
        ValueError: no level, or a level without children.
    """

    def __init__(self, width: int, branching: Sequence[int]) -> None:
        super().__init__()
        if not branching or min(branching) < 1:
            raise ValueError(f"branching={tuple(branching)} needs a level, and a child or more at each")
        self.branching, self.num_experts = tuple(branching), math.prod(branching)
        leaves = accumulate(branching, operator.mul)
        self.levels = nn.ModuleList(Affine(width, children) for children in leaves)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        logits = x.new_zeros(len(x), 1)  # of the root
        for level, children in zip(self.levels, self.branching, strict=True):
            here = level(x).unflatten(1, (-1, children)).log_softmax(-1)  # [tokens, nodes, children]
            logits = (logits.unsqueeze(2) + here).flatten(1)
        return logits

    def extra_repr(self) -> str:
        return f"branching={self.branching}"


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
