"""Residual-MoE."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, Linear, SoftmaxMix, TokenChoice, TopK, as_is, slots_of_choices, softmax


@method(
    title="DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale",
    paper="Rajbhandari et al. 2022",
    arxiv="2201.05596",
    family="token-choice",
    batch_independent=False,
)
def residual_moe(
    experts: Experts,
    *,
    capacity_factor: float = 1.0,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    balance: float = 1e-2,
) -> MoE:
    """A fixed network for every token, corrected by one routed expert; a learned softmax shares out the two.

    y = c_0 MoE(x) + c_1 MLP(x), c = softmax(x W + b). Experts that overflow drop by position, so that this is
    causal (the released code draws who is dropped: see zcode-m3).
    """
    slots = partial(slots_of_choices, k=1, minimum=min_capacity)
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(1),
        weigh=as_is,
        capacity=DropByPosition(
            partial(slots, factor=capacity_factor), partial(slots, factor=eval_capacity_factor)
        ),
    )
    losses = {"balance": (balance, LoadTimesProbability("switch"))}
    return MoE(SoftmaxMix(router, experts.width), experts, experts.dense(), losses=losses)
