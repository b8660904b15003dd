"""StableMoE."""

from functools import partial

from moestro.balance.distilled import distillation, signed_overload
from moestro.balance.steps import CountSteps
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, switch_slots
from moestro.routers.two_stage import TwoStage


@method(
    title="StableMoE: Stable Routing Strategy for Mixture of Experts",
    paper="Dai et al. 2022",
    arxiv="2204.08396",
    family="token-choice",
    batch_independent=False,
)
def stablemoe(
    experts: Experts,
    *,
    vocab_size: int,
    light_width: int = 50,
    two_stage_updates: int = 6000,
    capacity_factor: float = 2.0,
    balance: float = 0.3,
    distil: float = 0.3,
) -> MoE:
    """A balanced greedy router teaches a table of word embeddings, which then decides alone and never changes.

    Needs `Context.token_ids`. After `two_stage_updates` optimiser steps, and in every evaluation, a token id always
    has the same expert.
    """
    capacity = DropByPosition(partial(switch_slots, factor=capacity_factor, minimum=1))
    router = TwoStage(experts.width, experts.num_experts, vocab_size, light_width, two_stage_updates, capacity)
    losses = {"balance": (balance, signed_overload), "distillation": (distil, distillation)}
    return MoE(router, experts, losses=losses, controllers=[CountSteps()])
