"""Adaptive gating."""

from moestro.balance import single_choice_balance
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import CloseSecond, Linear, TokenChoice, renormalised_where_several, softmax


@method(
    title="Adaptive Gating in Mixture-of-Experts based Language Models",
    paper="Li et al. 2023",
    arxiv="2310.07188",
    family="token-choice",
)
def adaptive_gating(experts: Experts, *, margin: float = 0.1, balance: float = 1e-2) -> MoE:
    """One expert per token, and a second one where its probability comes within a margin of the first.

    Two weights are normalised; a single one is the raw probability. The balance loss counts tokens with one expert.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=CloseSecond(margin),
        weigh=renormalised_where_several,
    )
    return MoE(router, experts, losses={"balance": (balance, single_choice_balance)})
