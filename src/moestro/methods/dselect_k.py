"""DSelect-k."""

from moestro.balance import selector_entropy
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DSelectK


@method(
    title="DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning",
    paper="Hazimeh et al. 2021",
    arxiv="2106.03760",
    family="differentiable",
)
def dselect_k(experts: Experts, *, top_k: int = 2, gamma: float = 1.0, entropy: float = 1e-6) -> MoE:
    """k selectors that spell an expert's number in smooth bits: exact gradients, and k experts once trained.

    All experts run until the bits leave their soft band; the entropy loss (whose weight the paper raises over
    time) drives them out of it.
    """
    router = DSelectK(experts.width, experts.num_experts, top_k, gamma)
    return MoE(router, experts, losses={"entropy": (entropy, selector_entropy)})
