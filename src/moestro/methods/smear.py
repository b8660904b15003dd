"""SMEAR."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import SequenceMerging


@method(
    title="Soft Merging of Experts with Adaptive Routing",
    paper="Muqeeth et al. 2023",
    arxiv="2306.03745",
    family="merging",
    causal=False,
)
def smear(experts: Experts, *, expert_dropout: float = 0.1) -> MoE:
    """One expert per sequence, whose parameters are the mean of all experts' weighted by the sequence's router."""
    return MoE(SequenceMerging(experts.width, experts.num_experts, expert_dropout), experts)
