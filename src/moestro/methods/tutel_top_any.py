"""Tutel's gate for any k."""

from functools import partial
from typing import Literal

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    Cosine,
    DropByPosition,
    DropByPriority,
    Dropless,
    FixedNoise,
    Linear,
    TokenChoice,
    TopK,
    WeighsInputs,
    renormalised_where_several,
    softmax,
    tutel_slots,
)


@method(
    title="Tutel: Adaptive Mixture-of-Experts at Scale",
    paper="Hwang et al. 2023",
    arxiv="2206.03382",
    family="token-choice",
)
def tutel_top_any(
    experts: Experts,
    *,
    top_k: int = 2,
    capacity_factor: float = 0.0,
    priority: Literal["position", "batch"] = "position",
    scores: Literal["linear", "cosine"] = "linear",
    noise: float = 0.0,
    weigh: Literal["output", "input"] = "output",
    balance: float = 1e-2,
) -> MoE:
    """A gate whose k and capacity may change at every call: set `router.select.k` between calls.

    Slots are k * int(factor * ceil(tokens / experts)); a factor of 0 is as large as the load needs and drops
    nothing, a negative one the same up to a limit, which drops as its absolute value does. Weights are normalised;
    noise on the logits has standard deviation noise / experts.
    """
    num_experts = experts.num_experts
    select = TopK(top_k)
    slots = partial(tutel_slots, factor=abs(capacity_factor), select=select)
    drop = {"position": DropByPosition, "batch": DropByPriority}[priority]
    router = TokenChoice(
        scorer={"linear": Linear, "cosine": Cosine}[scores](experts.width, num_experts),
        noise=FixedNoise(noise / num_experts) if noise else None,
        gate=softmax,
        select=select,
        weigh=renormalised_where_several,
        capacity=drop(slots) if capacity_factor else Dropless(),
    )
    losses = {"balance": (balance, LoadTimesProbability("switch"))}
    return MoE(router if weigh == "output" else WeighsInputs(router), experts, losses=losses)
