"""Dynamic routing by cumulative probability."""

from moestro.balance import LoadTimesProbability, router_entropy
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopP, as_is, softmax


@method(
    title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    paper="Huang et al. 2024",
    arxiv="2403.07652",
    family="token-choice",
)
def dynamic_top_p(experts: Experts, *, threshold: float = 0.4, entropy: float = 1e-4, balance: float = 1e-2) -> MoE:
    """As many experts per token as their probabilities need to exceed a threshold, weighted by them.

    A small entropy loss keeps few experts sufficient. A fresh router uses the bound floor(threshold * experts) + 1,
    a trained one of 16 experts about two.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopP(threshold, experts.num_experts),
        weigh=as_is,
    )
    losses: dict[str, tuple[float, Loss]] = {
        "balance": (balance, LoadTimesProbability("megatron")),
        "entropy": (entropy, router_entropy),
    }
    return MoE(router, experts, losses=losses)
