"""Qwen3."""

from moestro.balance import GlobalBatchBalance
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, Renormalised, TokenChoice, TopK, softmax


@method(title="Qwen3 Technical Report", paper="Yang et al. 2025", arxiv="2505.09388", family="token-choice")
def qwen3(experts: Experts, *, top_k: int = 8, balance: float = 1e-3) -> MoE:
    """The k best of many small experts, weights normalised to one, balanced over the global batch.

    The paper has 128 experts, no shared one, and takes the counts of its balance loss from all ranks.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=Renormalised(),
    )
    return MoE(router, experts, losses={"balance": (balance, GlobalBatchBalance())})
