"""Single-gated mixtures of experts, revisited."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import TokenChoice, TopK, as_is, softmax
from moestro.routers.centroids import NearestCentroid
from moestro.routers.views import SeesSequence
from moestro.routers.with_base import BaseTakesTheRest


@method(
    title="Revisiting Single-gated Mixtures of Experts",
    paper="Royer et al. 2023",
    arxiv="2304.05497",
    family="token-choice",
    causal=False,
)
def single_gate_revisit(experts: Experts, *, sharpness: float = 1.0) -> MoE:
    """One expert per image beside a base branch, weighted g and 1 - g, g the expert's probability.

    The gate sees the mean of a sequence. Place its centres on base features with
    `moe.router.router.scorer.scorer.fit(x)`, and copy the base branch (`moe.shared`) into the experts.
    """
    scorer = SeesSequence(NearestCentroid(experts.width, experts.num_experts, sharpness))
    router = BaseTakesTheRest(TokenChoice(scorer, TopK(1), softmax, as_is))
    return MoE(router, experts, experts.dense(1))
