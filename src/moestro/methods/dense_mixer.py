"""DenseMixer."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DenseGradient, Linear, TokenChoice, TopK, as_is, softmax


@method(
    title="DenseMixer: Improving MoE Post-Training with Precise Router Gradient",
    paper="Yao et al. 2025",
    family="differentiable",
)
def dense_mixer(experts: Experts, *, top_k: int = 8, balance: float = 1e-2) -> MoE:
    """Top-k routing whose router learns in training from what all experts would have answered.

    Outputs are those of the k chosen experts, weighted by raw probabilities; training runs all of them.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    return MoE(DenseGradient(router), experts, losses={"balance": (balance, LoadTimesProbability("megatron"))})
