"""Uni-Perceiver-MoE."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax, softmax_over_selected
from moestro.routers.noises import FixedNoise
from moestro.routers.views import SeesAttributes


@method(
    title="Uni-Perceiver-MoE: Learning Sparse Generalist Models with Conditional MoEs",
    paper="Zhu et al. 2022",
    arxiv="2206.04674",
    family="token-choice",
)
def uni_perceiver_moe(experts: Experts, *, num_attributes: int = 8, top_k: int = 2, noise: float = 1.0) -> MoE:
    """Routing by attributes of a token (modality, task, place), the bits of `Context.domain`; no loss.

    Training adds normal noise of size `noise / experts` to the logits; without it, tokens of equal attributes share
    their experts and weights, so that linear experts can be merged beforehand.
    """
    width, num_experts = experts.width, experts.num_experts
    router = TokenChoice(
        scorer=SeesAttributes(Linear(width, num_experts), width, num_attributes),
        noise=FixedNoise(noise / num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=softmax_over_selected if top_k > 1 else as_is,
    )
    return MoE(router, experts)
