"""Conditional MoE routing."""

from moestro.balance import GateBudget, LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import BudgetedMix, Linear, Renormalised, TokenChoice, TopK, softmax


@method(
    title="No Language Left Behind: Scaling Human-Centered Machine Translation",
    paper="NLLB team 2022",
    arxiv="2207.04672",
    family="token-choice",
)
def cmr(
    experts: Experts,
    *,
    top_k: int = 2,
    budget: float = 0.8,
    budget_weight: float = 0.1,
    gate_dropout: float = 0.2,
    balance: float = 1e-2,
) -> MoE:
    """A learned gate shares each token out between a common network and the mixture, under a budget.

    y = (1 - g) FFN(x) + g MoE(x), g = dropout(sigmoid(x w + b)); a loss holds the mean of g at `budget`. Two
    experts with normalised weights; nothing is dropped.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=Renormalised(epsilon=1e-9),
    )
    losses: dict[str, tuple[float, Loss]] = {
        "balance": (balance, LoadTimesProbability("switch")),
        "budget": (budget_weight, GateBudget(budget)),
    }
    return MoE(BudgetedMix(router, experts.width, gate_dropout), experts, experts.dense(), losses=losses)
