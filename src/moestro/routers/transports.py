"""Selections by optimal transport: even in training, greedy in evaluation."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from moestro.routers.assignment import balanced_assignment
from moestro.routers.plans import sinkhorn
from moestro.routers.selects import Select
from moestro.routing import Context, Selection, top_k
from moestro.routing.context import NO_CONTEXT


class EvenInTraining(Select):
    """Balances all tokens of a call in training; takes the k best scores in evaluation.

    Scores are probabilities; the plan is made of their logarithms. Row by row those differ from the logits by a
    constant, which no plan sees. Padding takes no part. Training looks at later tokens: causal in evaluation only.

    Args:
        k: experts per token.
    """

    causal = False
    causal_evaluation = True

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k

    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        if not self.training:
            return Selection(top_k(scores, self.k))
        index = top_k(scores, self.k)
        present = slice(None) if context.valid is None else context.valid
        if scores[present].numel():
            index[present] = self.plan(finite(scores[present].detach().log()))
        return Selection(index)

    @abstractmethod
    def plan(self, logits: Tensor) -> Tensor:
        """Experts of each token, `[tokens, experts]` -> `[tokens, k]` int64; at least one token, all finite."""

    def extra_repr(self) -> str:
        return f"k={self.k}"


class BalancedAssignment(EvenInTraining):
    """Sends T / E tokens to every expert so that the sum of scores is largest.

        max over assignments of sum_t s[t, a_t],   T / E tokens per expert        Lewis et al. 2021, eq. 3

    The paper's auction comes near the optimum; here it is exact, by `balanced_assignment` on the CPU. Where E does
    not divide T, loads differ by at most one.
    """

    def __init__(self) -> None:
        super().__init__(k=1)

    def plan(self, logits: Tensor) -> Tensor:
        owner = balanced_assignment(logits.double().cpu().numpy())
        return torch.from_numpy(owner).to(logits.device).unsqueeze(1)


class SinkhornInTraining(EvenInTraining):
    """The k best entries of an entropic transport plan between tokens and experts.

        Pi = diag(u) exp(z) diag(v) with row sums 1/T and column sums 1/E        Clark et al. 2022, section 3

    Soft balance: rows are rounded to their k best, no expert has a limit.

    Args:
        k: experts per token.
        tolerance: largest change of log v at which the iteration stops.
        iterations: at most so many sweeps.
    """

    def __init__(self, k: int = 1, tolerance: float = 1e-4, iterations: int = 200) -> None:
        super().__init__(k)
        self.tolerance, self.iterations = tolerance, iterations

    def plan(self, logits: Tensor) -> Tensor:
        return top_k(sinkhorn(logits, self.iterations, self.tolerance), self.k)


def finite(logits: Tensor) -> Tensor:
    """Logits whose non-finite entries are the smallest finite one (0 if there is none)."""
    good = logits.isfinite()
    least = float(logits[good].min()) if bool(good.any()) else 0.0
    return logits.where(good, least)
