"""The mixture of fairseq's language models."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPosition,
    Dropless,
    Linear,
    RandomSecond,
    Renormalised,
    TokenChoice,
    TopK,
    gshard_slots,
    share_of_tokens,
    softmax,
)


@method(
    title="Efficient Large Scale Language Modeling with Mixtures of Experts",
    paper="Artetxe et al. 2021",
    arxiv="2112.10684",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def artetxe_moe(
    experts: Experts,
    *,
    capacity_factor: float | None = 2.0,
    eval_fraction: float = 0.25,
    balance: float = 1e-2,
) -> MoE:
    """GShard's gate in every other layer of a decoder, whose evaluation capacity is a share of all tokens.

    In evaluation an expert takes ceil(eval_fraction * tokens), however many experts there are: small batches lose
    tokens silently. Weights are normalised before the drop. The paper also divides the gradients of experts by the
    square root of the number of shards, which is the trainer's part. `capacity_factor=None` drops nothing.
    """
    capacity = (
        Dropless()
        if capacity_factor is None
        else DropByPosition(
            partial(gshard_slots, factor=capacity_factor), partial(share_of_tokens, share=eval_fraction)
        )
    )
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=RandomSecond(TopK(2)),
        weigh=Renormalised(epsilon=1e-9),
        capacity=capacity,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
