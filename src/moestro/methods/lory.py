"""Lory."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear
from moestro.routers.segments import SegmentMerging


@method(
    title="Lory: Fully Differentiable Mixture-of-Experts for Autoregressive Language Model Pre-training",
    paper="Zhong et al. 2024",
    arxiv="2405.03133",
    family="merging",
    causal=False,
)
def lory(experts: Experts, *, segment_length: int = 256) -> MoE:
    """One merged expert per segment, mixed by the mean of the segment before it.

    The first segment uses its own mean with the gradient stopped, so within it outputs depend on later tokens, as
    the authors accept. Training batches should join similar documents.
    """
    return MoE(SegmentMerging(Linear(experts.width, experts.num_experts), segment_length), experts)
