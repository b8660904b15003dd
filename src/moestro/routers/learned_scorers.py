"""More scorers: cosine, attention across experts, block means, a network, two levels, the layer before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.scorers import Scorer
from moestro.routing.context import NO_CONTEXT, Context


class Cosine(Scorer):
    """Cosine similarity to expert embeddings in a few dimensions.

        h = x W_r,   s_e = h . v_e / (|h| |v_e|)        Chi et al. 2022, eq. 5

    Args:
        width: model width.
        num_experts: number of experts.
        dimensions: of the space; default: half the number of experts, at least 2 (one is only a sign).

    Shapes: x `[tokens, width]` -> `[tokens, experts]`, between -1 and 1; projection `[dimensions, width]`,
    embedding `[experts, dimensions]` (orthogonal at the start, gain 0.32).
    """

    def __init__(self, width: int, num_experts: int, dimensions: int | None = None) -> None:
        super().__init__()
        dimensions = max(num_experts // 2, 2) if dimensions is None else dimensions
        if dimensions < 1:
            raise ValueError(f"dimensions={dimensions} of the cosine router must be at least 1")
        self.num_experts = num_experts
        self.projection = nn.Parameter(torch.randn(dimensions, width) * width**-0.5)
        self.embedding = nn.Parameter(torch.empty(num_experts, dimensions))
        nn.init.orthogonal_(self.embedding, 0.32)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        token = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1)
        return F.linear(token, F.normalize(self.embedding.to(x.dtype), dim=-1))


class AttentionAcrossExperts(Scorer):
    """Experts attend to each other within a token, so that correlated experts are scored together.

        q, k, v = x W_q, x W_k, x W_v  (one number per expert);   z_i = sum_j softmax_j(q_i k_j) v_j
        Wu et al. 2024 (Yuan 2.0-M32), section 2.1

    Tokens do not attend to each other.

    Args:
        width: model width.
        num_experts: number of experts.
        std: standard deviation of the initial weights.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; weight `[3, experts, width]`.
    """

    def __init__(self, width: int, num_experts: int, std: float = 0.02) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(3, num_experts, width) * std)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        query, key, value = F.linear(x, self.weight.to(x.dtype).flatten(0, 1)).chunk(3, dim=-1)
        attention = (query.unsqueeze(2) * key.unsqueeze(1)).softmax(-1)  # [tokens, experts, experts]
        return (attention @ value.unsqueeze(2)).squeeze(2)


class BlockMeans(Scorer):
    """Grouped average pooling: the score of expert e is the mean of the e-th block of x, if positive.

        G_e = relu(mean of x[e d/E : (e+1) d/E])        Li et al. 2024 (LocMoE), section 3.1

    No parameters; the rows of this gate are orthogonal. Where E does not divide d, blocks differ by one place.

    Args:
        width: model width, at least the number of experts.
        num_experts: number of experts.

    Raises:
        ValueError: fewer places than experts.
    """

    gate: Tensor

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        if width < num_experts:
            raise ValueError(f"width={width} has no block for each of {num_experts} experts; use fewer experts")
        self.num_experts = num_experts
        block = torch.arange(width) * num_experts // width
        gate = F.one_hot(block, num_experts).t().float()
        self.register_buffer("gate", gate / gate.sum(1, keepdim=True), persistent=False)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return F.linear(x, self.gate.to(x.dtype)).relu()


class GeluNetwork(Scorer):
    """A small network: `logits = W_2 gelu(W_1 x + b)`, with dropout on the hidden units (Shen et al. 2023).

    Args:
        width: model width.
        num_experts: number of experts.
        hidden: hidden units.
        dropout: share of hidden units set to zero in training.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`; inner `[hidden, width]`, bias `[hidden]`,
    outer `[experts, hidden]`.
    """

    def __init__(self, width: int, num_experts: int, hidden: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        if hidden < 1 or not 0 <= dropout < 1:
            raise ValueError(f"a gate needs hidden >= 1 and 0 <= dropout < 1, got {hidden} and {dropout}")
        self.num_experts, self.dropout = num_experts, dropout
        self.inner = nn.Parameter(torch.randn(hidden, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.randn(num_experts, hidden) * hidden**-0.5)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        hidden = F.gelu(F.linear(x, self.inner.to(x.dtype), self.bias.to(x.dtype)))
        return F.linear(F.dropout(hidden, self.dropout, self.training), self.outer.to(x.dtype))


class TwoLevels(Scorer):
    """Logits of nodes plus logits of places in a node: a softmax over the sums is the product of two softmaxes.

        z_(i,j) = x . u_i + x . v_j,   softmax(z)_(i,j) = softmax(x U)_i softmax(x V)_j
        He et al. 2022 (SMILE), section 3.2

    All nodes share one inner router, so it has nodes + places rows instead of nodes * places.

    Args:
        width: model width.
        num_nodes: nodes.
        per_node: experts of a node; expert (i, j) is number i * per_node + j.

    Shapes: x `[tokens, width]` -> `[tokens, nodes * per_node]`; node `[nodes, width]`, place `[per_node, width]`.
    """

    def __init__(self, width: int, num_nodes: int, per_node: int, std: float = 0.02) -> None:
        super().__init__()
        self.num_experts = num_nodes * per_node
        self.node = nn.Parameter(torch.randn(num_nodes, width) * std)
        self.place = nn.Parameter(torch.randn(per_node, width) * std)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        node, place = F.linear(x, self.node.to(x.dtype)), F.linear(x, self.place.to(x.dtype))
        return (node.unsqueeze(2) + place.unsqueeze(1)).flatten(1)


class GatingResidual(Scorer):
    """Adds a map of the previous layer's logits, so that routers remember the path of a token.

        z = scorer(x) + z_previous W        Jin et al. 2024 (MoE++), eq. 6

    The previous logits are those of `Context.previous`; the first layer has none.

    Args:
        scorer: the scorer inside.

    Raises:
        ValueError: at the call, previous logits of another number of experts.

    Shapes: weight `[experts, experts]`, zero at the start.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer, self.num_experts = scorer, scorer.num_experts
        self.causal, self.batch_independent = scorer.causal, scorer.batch_independent
        self.weight = nn.Parameter(torch.zeros(scorer.num_experts, scorer.num_experts))

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        logits: Tensor = self.scorer(x, context)
        before = None if context.previous is None else context.previous.logits
        before = torch.zeros_like(logits) if before is None else before.to(logits.dtype)
        if before.shape != logits.shape:
            raise ValueError(
                f"the previous layer's logits have shape {list(before.shape)} but this one's {list(logits.shape)}; "
                f"give all layers the same experts"
            )
        return logits + F.linear(before, self.weight.to(logits.dtype))
