"""HOMOE."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import SoftSlots


@method(
    title="HOMOE: A Memory-Based and Composition-Aware Framework for Zero-Shot Learning with Hopfield Network "
    "and Soft Mixture of Experts",
    paper="Dat et al. 2023",
    arxiv="2311.14747",
    family="soft",
    causal=False,
)
def hope_homoe(experts: Experts, *, slots_per_expert: int = 1) -> MoE:
    """Soft MoE over an image embedding, the prototypes it calls up from memory, and composed texts.

    One sequence holds these tokens; `moestro.routers.retrieval.Retrieval` is the memory.
    """
    return MoE(SoftSlots(experts.width, experts.num_experts, slots_per_expert), experts)
