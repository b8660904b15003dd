"""OLMoE."""

from moestro.balance import LoadTimesProbability, z_loss
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax


@method(
    title="OLMoE: Open Mixture-of-Experts Language Models",
    paper="Muennighoff et al. 2024",
    arxiv="2409.02060",
    family="token-choice",
)
def olmoe(experts: Experts, *, top_k: int = 8, balance: float = 1e-2, z: float = 1e-3) -> MoE:
    """The k best of 64 small experts with raw probabilities as weights; nothing is dropped, nothing is shared.

    Weights sum to less than one. The balance loss counts all choices and is 1 when even (`transformers` states
    the same coefficient for a loss that is k times as large).
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("megatron")), "z": (z, z_loss)})
