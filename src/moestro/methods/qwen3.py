"""Qwen3."""

from moestro.balance import GlobalBatchBalance
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, Renormalised, TokenChoice, TopK, softmax


@method(title="Qwen3 Technical Report", paper="Yang et al. 2025", arxiv="2505.09388", family="token-choice")
def qwen3(experts: Experts, *, top_k: int = 8, shared_experts: int = 0, balance: float = 1e-3) -> MoE:
    """The k best of many small experts, weights normalised to one, balanced over the global batch.

    The paper has 128 experts, no shared one (Hunyuan and Granite route alike and have), and takes the counts of its
    balance loss from all ranks.
    """
    if shared_experts < 0:
        raise ValueError(f"shared_experts={shared_experts} must not be negative")
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=Renormalised(),
    )
    shared = experts.dense(shared_experts) if shared_experts else None
    return MoE(router, experts, shared, losses={"balance": (balance, GlobalBatchBalance())})
