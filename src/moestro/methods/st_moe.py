"""ST-MoE."""

from functools import partial

from moestro.balance import LoadTimesProbability, z_loss
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPosition,
    Dropless,
    InputJitter,
    Linear,
    RandomSecond,
    Renormalised,
    TokenChoice,
    TopK,
    softmax,
    switch_slots,
)


@method(
    title="ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    paper="Zoph et al. 2022",
    arxiv="2202.08906",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def st_moe(
    experts: Experts,
    *,
    capacity_factor: float | None = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    threshold: float = 0.2,
    jitter: float = 1e-2,
    balance: float = 1e-2,
    z: float = 1e-3,
) -> MoE:
    """Two experts per token, the second kept at random, with a z-loss that keeps router logits small.

    Weights are normalised before any drop; capacity = factor * tokens / experts without a factor of two, larger in
    evaluation. A capacity for two choices is not causal: `capacity_factor=None` drops nothing and is.
    """
    slots = partial(partial, switch_slots, minimum=min_capacity)
    router = TokenChoice(
        scorer=InputJitter(Linear(experts.width, experts.num_experts), jitter),
        gate=softmax,
        select=RandomSecond(TopK(2), threshold),
        weigh=Renormalised(epsilon=1e-9),
        capacity=Dropless()
        if capacity_factor is None
        else DropByPosition(slots(factor=capacity_factor), slots(factor=eval_capacity_factor)),
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch")), "z": (z, z_loss)})
