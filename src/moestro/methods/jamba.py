"""Jamba."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax


@method(
    title="Jamba: A Hybrid Transformer-Mamba Language Model",
    paper="Lieber et al. 2024",
    arxiv="2403.19887",
    family="token-choice",
)
def jamba(experts: Experts, *, top_k: int = 2, balance: float = 1e-3) -> MoE:
    """Two of sixteen experts in every second layer, weighted by raw probabilities that sum to less than one."""
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("transformers"))})
