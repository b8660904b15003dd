"""Skywork-MoE."""

from functools import partial

from moestro.balance import AdaptiveLoss, FollowDrops, LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, Renormalised, Standardised, TokenChoice, TopK, slots_of_choices
from moestro.routers.gate_networks import Affine


@method(
    title="Skywork-MoE: A Deep Dive into Training Techniques for Mixture-of-Experts Language Models",
    paper="Wei et al. 2024",
    arxiv="2406.06563",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def skywork_moe(
    experts: Experts,
    *,
    top_k: int = 2,
    scale: float = 1.0,
    capacity_factor: float = 1.25,
    balance: float = 1e-2,
    gain: float = 0.2,
    decay: float = 0.99,
) -> MoE:
    """Logits standardised token by token, and in each layer a balance loss as strong as tokens are dropped.

    The weight of the loss starts at `balance`, never exceeds it, and follows gain * dropped share with the memory
    `decay`; so it needs a capacity. With several choices that is not causal.
    """
    router = TokenChoice(
        scorer=Affine(experts.width, experts.num_experts),
        gate=Standardised(scale),
        select=TopK(top_k),
        weigh=Renormalised(),
        capacity=DropByPosition(partial(slots_of_choices, factor=capacity_factor, k=top_k)),
    )
    losses = {"balance": (1.0, AdaptiveLoss(LoadTimesProbability("megatron"), start=balance))}
    follow = FollowDrops("balance", gain=gain, largest=balance, decay=decay)
    return MoE(router, experts, losses=losses, controllers=[follow])
