"""Yuan 2.0-M32."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import AttentionAcrossExperts, TokenChoice, TopK, softmax, softmax_over_selected


@method(
    title="Yuan 2.0-M32: Mixture of Experts with Attention Router",
    paper="Wu et al. 2024",
    arxiv="2405.17976",
    family="token-choice",
)
def yuan_attention_router(experts: Experts, *, top_k: int = 2, balance: float = 1e-2) -> MoE:
    """Two of 32 experts whose scores attend to each other within the token, weighted by a softmax over both.

    The paper names no balance loss; this one counts all choices and is 1 when even.
    """
    router = TokenChoice(
        scorer=AttentionAcrossExperts(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=softmax_over_selected,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("megatron"))})
