"""gpt-oss."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Biased, Linear, TokenChoice, TopK, softmax, softmax_over_selected


@method(
    title="gpt-oss-120b & gpt-oss-20b Model Card",
    paper="OpenAI 2025",
    arxiv="2508.10925",
    family="token-choice",
)
def gpt_oss(experts: Experts, *, top_k: int = 4, balance: float = 1e-2) -> MoE:
    """Four of many experts from logits with a bias, weighted by a softmax over the chosen ones.

    The bias is learned and weighs as well as it selects. How the published models were balanced is not known; the
    loss here counts all choices and is 1 when even.
    """
    router = TokenChoice(
        scorer=Biased(Linear(experts.width, experts.num_experts)),
        gate=softmax,
        select=TopK(top_k),
        weigh=softmax_over_selected,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("megatron"))})
