"""Qwen1.5-MoE and Qwen2-MoE."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts, GatedFeedForward
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax


@method(
    title="Qwen1.5-MoE: Matching 7B Model Performance with 1/3 Activated Parameters",
    paper="Qwen Team 2024",
    family="token-choice",
)
def qwen_moe(experts: Experts, *, top_k: int = 4, shared_experts: int = 4, balance: float = 1e-3) -> MoE:
    """Small routed experts with raw probabilities as weights, beside a wide shared one under a sigmoid gate.

    y = sum of a_e f_e(x) + sigmoid(x w) f_shared(x). The paper has 60 routed experts and a shared one as wide as
    four of them.
    """
    if shared_experts < 1:
        raise ValueError(f"shared_experts={shared_experts} must be at least 1; for none use olmoe")
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    shared = GatedFeedForward(experts.dense(shared_experts))
    return MoE(router, experts, shared, losses={"balance": (balance, LoadTimesProbability("transformers"))})
