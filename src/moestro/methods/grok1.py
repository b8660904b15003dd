"""Grok-1."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax


@method(title="Open Release of Grok-1", paper="xAI 2024", family="token-choice")
def grok1(experts: Experts, *, top_k: int = 2) -> MoE:
    """Two of eight experts weighted by raw probabilities, from a router that starts at zero.

    Only inference code is public: no balance loss is known, so none is added. At the start all experts tie, and
    the lowest ones serve every token.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts, std=0),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    return MoE(router, experts)
