"""Mixtral 8x7B."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, softmax, softmax_over_selected


@method(title="Mixtral of Experts", paper="Jiang et al. 2024", arxiv="2401.04088", family="token-choice")
def mixtral(experts: Experts, *, top_k: int = 2, balance: float = 0.02) -> MoE:
    """The k best experts weighted by a softmax over their logits; nothing is dropped.

    The balance loss counts all k choices and is k when even, as `transformers` trains it, but per layer.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=softmax_over_selected,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("transformers"))})
