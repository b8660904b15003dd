"""Plans: scores of a group of tokens to an even assignment, for selection only. None carries a gradient.

All take scores `[tokens, experts]` and work in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Capped:
    """Fills every expert's slots while no token gets more than `bound` experts.

        max_A <S', A> + lambda H(A);   sum_t A[e, t] = slots,   sum_e A[e, t] <= bound,   0 <= A <= 1
        Zhou et al. 2022, section 3.2

    Solved by alternating Kullback-Leibler projections with Dykstra's correction, written in the prices u, v, w of
    the three constraints: `A = exp((S - u_e - v_t - w_te) / lambda)`. At the paper's lambda = 0.001 a hundred plain
    sweeps are far from the solution (a row of 4 off by 3), so lambda falls from 0.1 while prices are kept.

    Attributes:
        bound: experts per token at most.
        entropy: lambda at the end, above 0; small is close to the linear program.
        sweeps: rounds of projections.
    """

    bound: int
    entropy: float = 1e-3
    sweeps: int = 300

    def __post_init__(self) -> None:
        if self.entropy <= 0 or self.bound < 1 or self.sweeps < 1:
            raise ValueError(f"entropy must be above 0, bound and sweeps at least 1, got {self}")

    @torch.no_grad()
    def __call__(self, scores: Tensor, slots: int) -> Tensor:
        """Shapes: scores `[tokens, experts]` -> the plan, likewise."""
        if not scores.numel() or not slots:
            return scores
        worth = scores.double()
        token, pair = torch.zeros_like(worth[:, :1]), torch.zeros_like(worth)
        for sweep in range(self.sweeps):
            heat = self._heat(sweep)
            expert = heat * (((worth - token - pair) / heat).logsumexp(0, keepdim=True) - math.log(slots))
            token = heat * (((worth - expert - pair) / heat).logsumexp(1, keepdim=True) - math.log(self.bound))
            token = token.clamp(min=0)
            pair = (worth - expert - token).clamp(min=0)
        return ((worth - expert - token - pair) / self.entropy).exp()

    def _heat(self, sweep: int) -> float:
        start = max(0.1, self.entropy)
        return max(self.entropy, start * (self.entropy / start) ** (sweep / (0.9 * self.sweeps)))


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 20, tolerance: float = 0.0) -> Tensor:
    """The logarithm of an entropic transport plan: rows sum to 1, columns to T / E at convergence.

        plan = diag(u) exp(z) diag(v),   u and v by turns until log v moves by less than `tolerance`

    In the log domain, where nothing overflows. Adding a constant to a token's or to an expert's logits changes
    nothing, so log probabilities do as well. The paper's plan with row sums 1/T is this one less log T.

    Shapes: logits `[tokens, experts]` -> the same.
    """
    z = logits.double()
    if not z.numel():
        return z
    share = math.log(z.shape[0] / z.shape[1])
    column = z.new_zeros(z.shape[1])
    for _ in range(iterations):
        row = -(z + column).logsumexp(1, keepdim=True)
        before, column = column, share - (z + row).logsumexp(0)
        if tolerance and bool((column - before).abs().max() < tolerance):
            break
    return (z + column).log_softmax(1)


@dataclass(frozen=True)
class BySinkhorn:
    """`sinkhorn` of the logarithm of softmax scores: the affinity of expert choice."""

    iterations: int = 20

    def __call__(self, scores: Tensor, slots: int) -> Tensor:
        """Shapes: scores `[tokens, experts]` -> the same."""
        return sinkhorn(scores.clamp(min=torch.finfo(scores.dtype).tiny).log(), self.iterations).exp()


@torch.no_grad()
def sparse_projection(scores: Tensor, total: float, nonzeros: int) -> Tensor:
    """Nearest point with few entries that are not negative and sum to `total`: row by row.

        argmax <s, t> - |t|^2 / 2   over   t >= 0, sum t = total, at most `nonzeros` entries        Liu et al. 2022

    Shapes: scores `[rows, entries]` -> the same.
    """
    ranked = scores.sort(dim=1, descending=True, stable=True)
    best = ranked.values[:, :nonzeros]
    count = torch.arange(1, best.shape[1] + 1, device=scores.device)
    level = (best.cumsum(1) - total) / count  # the shift if so many entries stay
    stays = (best > level).sum(1, keepdim=True).clamp(min=1)
    kept = (best - level.gather(1, stays - 1)).clamp(min=0)
    return torch.zeros_like(scores).scatter(1, ranked.indices[:, :nonzeros], kept)


@dataclass(frozen=True)
class SparsityConstrained:
    """Quadratic transport in which an expert holds at most `slots` tokens.

        max_P <S, P> - |P|^2 / 2;   rows sum to 1, columns to T / E,   at most `slots` nonzeros per column
        Liu et al. 2022 (sparsity-constrained optimal transport), solved in the semi-dual by Adam

    Columns hold exactly; rows as well as the iterations allow.

    Attributes:
        iterations: steps of Adam.
        rate: its step size.
    """

    iterations: int = 100
    rate: float = 1e-2

    def __call__(self, scores: Tensor, slots: int) -> Tensor:
        """Shapes: scores `[tokens, experts]` -> plan `[tokens, experts]`."""
        if not scores.numel():
            return scores
        columns, (num_tokens, num_experts) = scores.detach().double().t(), scores.shape
        price = torch.zeros(num_tokens, dtype=torch.float64, device=scores.device)
        optimiser = torch.optim.Adam([price], self.rate)
        for _ in range(self.iterations):
            plan = sparse_projection(columns - price, num_tokens / num_experts, slots)
            price.grad = 1 - plan.sum(0)
            optimiser.step()
        return sparse_projection(columns - price, num_tokens / num_experts, slots).t()
