"""Mixtures of vectors and of low-rank adapters."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import InputJitter, TokenChoice, TopK, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routers.gate_networks import Affine


@method(
    title="Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
    paper="Zadouri et al. 2023",
    arxiv="2309.05444",
    family="dense",
)
def mov_molora(experts: Experts, *, top_k: int | None = None, jitter: float = 0.0) -> MoE:
    """A dense softmax over tiny experts, with a biased gate and no loss.

    `top_k` masks all but the k largest weights, which are not renormalised (the paper finds soft better);
    `jitter` multiplies what the gate sees by noise in training.
    """
    num_experts = experts.num_experts
    select = EveryExpert(num_experts) if top_k is None else TopK(top_k)
    scorer = InputJitter(Affine(experts.width, num_experts, std=0.02), jitter)
    return MoE(TokenChoice(scorer, select, softmax, as_is), experts)
