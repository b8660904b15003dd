"""SparseMixer."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, SparseMixer


@method(
    title="Sparse Backpropagation for MoE Training",
    paper="Liu et al. 2023",
    arxiv="2310.00811",
    family="differentiable",
)
def sparse_mixer(experts: Experts, *, top_k: int = 2, epsilon: float = 0.01, balance: float = 1e-2) -> MoE:
    """Draws experts near the best one in training, with a router gradient that accounts for those not drawn.

    Weights are probabilities among the experts close to the best, one choice after another, as Phi-3.5-MoE routes;
    they need not sum to one.
    """
    router = SparseMixer(Linear(experts.width, experts.num_experts), top_k, epsilon)
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("megatron"))})
