"""Z-code M3."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import InputJitter, Linear, TokenChoice, TopK, as_is, softmax
from moestro.routers.capacities import slots_of_choices
from moestro.routers.masks import DropAtRandom


@method(
    title="Scalable and Efficient MoE Training for Multitask Multilingual Models",
    paper="Kim et al. 2021",
    arxiv="2109.10465",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def zcode_m3(
    experts: Experts,
    *,
    capacity_factor: float = 1.0,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    jitter: float = 1e-2,
    balance: float = 1e-2,
) -> MoE:
    """One expert per token; an expert that overflows keeps a random part of its tokens, not the earliest.

    capacity = ceil(capacity_factor * tokens / experts). Random selection looks at all tokens, so training is not
    causal; evaluation drops by position (the released code draws there too, unless told not to).
    """
    slots = partial(slots_of_choices, k=1, minimum=min_capacity)
    router = TokenChoice(
        scorer=InputJitter(Linear(experts.width, experts.num_experts), jitter),
        gate=softmax,
        select=TopK(1),
        weigh=as_is,
        capacity=DropAtRandom(partial(slots, factor=capacity_factor), partial(slots, factor=eval_capacity_factor)),
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
