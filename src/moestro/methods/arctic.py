"""Snowflake Arctic."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPosition,
    Dropless,
    InTraining,
    Linear,
    TokenChoice,
    TopK,
    slots_of_choices,
    softmax,
    softmax_over_selected,
)


@method(
    title="Snowflake Arctic: The Best LLM for Enterprise AI",
    paper="Snowflake 2024",
    family="token-choice",
)
def arctic(experts: Experts, *, top_k: int = 2, capacity_factor: float | None = None, balance: float = 1e-3) -> MoE:
    """Two of 128 experts weighted by a softmax over their logits, to run beside a dense layer.

    The published block feeds this layer from before the attention and adds a dense network after it: see
    `moestro.layers.DenseMoEBlock`. The paper trains with capacity_factor=1, which is not causal for two choices;
    by default nothing is dropped.
    """
    capacity = (
        Dropless()
        if capacity_factor is None
        else InTraining(DropByPosition(partial(slots_of_choices, factor=capacity_factor, k=top_k)))
    )
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=softmax_over_selected,
        capacity=capacity,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("transformers"))})
