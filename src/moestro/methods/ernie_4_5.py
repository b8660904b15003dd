"""ERNIE 4.5."""

from moestro.balance import LoadTimesProbability, LossFreeBias
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import BiasedSelection, Linear, Renormalised, TokenChoice, TopK, softmax


@method(title="ERNIE 4.5 Technical Report", paper="Baidu 2025", family="token-choice")
def ernie_4_5(
    experts: Experts,
    *,
    top_k: int = 6,
    shared_experts: int = 2,
    bias_rate: float = 1e-3,
    balance: float = 1e-3,
) -> MoE:
    """Softmax scores, a bias that only selects, weights normalised to one, and shared experts beside the routed.

    Routing is that of the released models (64 experts, 6 of them and 2 shared for a token); the bias moves by
    `bias_rate` after each step (loss-free balancing, arXiv 2408.15664), and the balance loss is transformers' own.
    """
    if shared_experts < 0:
        raise ValueError(f"shared_experts={shared_experts} must not be negative")
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=BiasedSelection(TopK(top_k), experts.num_experts),
        weigh=Renormalised(),
    )
    return MoE(
        router,
        experts,
        experts.dense(shared_experts) if shared_experts else None,
        losses={"balance": (balance, LoadTimesProbability("transformers"))},
        controllers=[LossFreeBias(bias_rate)] if bias_rate else [],
    )
