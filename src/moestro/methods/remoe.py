"""ReMoE."""

from moestro.balance import AdaptiveLoss, AdaptiveSparsity, LoadWeightedL1
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, Positive, TokenChoice, as_is, relu
from moestro.routers.base import check_top_k


@method(
    title="ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    paper="Wang et al. 2024",
    arxiv="2412.14711",
    family="differentiable",
)
def remoe(experts: Experts, *, top_k: int = 2, l1: float = 1e-8, rate: float = 1.2) -> MoE:
    """Every expert with a positive score runs, weighted by it; a growing L1 loss makes tokens use `top_k` of them.

    The weight of the loss starts at `l1` and is multiplied or divided by `rate` at each step, until the share of
    unused pairs is 1 - top_k / experts. The paper steers all layers by one weight; here each layer has its own.
    """
    if l1 <= 0:
        raise ValueError(f"l1={l1} must be above 0: a weight of zero stays zero")
    num_experts = experts.num_experts
    router = TokenChoice(
        scorer=Linear(experts.width, num_experts),
        gate=relu,
        select=Positive(num_experts, check_top_k(top_k, num_experts)),
        weigh=as_is,
    )
    losses = {"l1": (1.0, AdaptiveLoss(LoadWeightedL1(top_k), start=l1))}
    return MoE(router, experts, losses=losses, controllers=[AdaptiveSparsity("l1", top_k, rate)])
