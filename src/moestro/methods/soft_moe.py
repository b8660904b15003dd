"""Soft MoE."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import SoftSlots


@method(
    title="From Sparse to Soft Mixtures of Experts",
    paper="Puigcerver et al. 2023",
    arxiv="2308.00951",
    family="soft",
    causal=False,
)
def soft_moe(experts: Experts, *, slots_per_expert: int = 1) -> MoE:
    """Every slot reads a weighted mean of a sequence's tokens; every token reads a weighted mean of the slots."""
    return MoE(SoftSlots(experts.width, experts.num_experts, slots_per_expert), experts)
