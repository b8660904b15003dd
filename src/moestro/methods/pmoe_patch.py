"""Patch-level routing."""

from typing import Literal

import torch
from torch import Tensor

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import ExpertChoice, Linear
from moestro.routers.groups import EachSequence, Fixed


@method(
    title="Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient "
    "for Convolutional Neural Networks",
    paper="Chowdhury et al. 2023",
    arxiv="2306.04073",
    family="expert-choice",
    causal=False,
)
def pmoe_patch(experts: Experts, *, patches: int = 4, training: Literal["joint", "separate"] = "joint") -> MoE:
    """Each expert scores all patches of a sample and works on the best few.

    `joint`: a softmax over the patches an expert picked weighs them. `separate`: the router is fixed beforehand
    (load it from class patterns) and every picked patch weighs 1 / patches. A sample is a sequence.
    """
    num_experts = experts.num_experts
    scorer = Linear(experts.width, num_experts)
    scorer.weight.requires_grad_(training == "joint")
    router = ExpertChoice(
        scorer,
        Fixed(patches, float(num_experts)),
        gate=Tensor.clone,
        weigh=softmax_over_picked if training == "joint" else evenly,
        group=EachSequence(),
    )
    return MoE(router, experts)


def softmax_over_picked(scores: Tensor, picked: Tensor) -> Tensor:
    """For each expert, a softmax over the tokens it picked. `[tokens, experts]`, columns sum to 1."""
    low = scores.masked_fill(~picked, torch.finfo(scores.dtype).min)
    return low.softmax(0).masked_fill(~picked, 0) if len(scores) else scores


def evenly(scores: Tensor, picked: Tensor) -> Tensor:
    """One share for every token that an expert picked. `[tokens, experts]`, columns sum to 1."""
    return picked.to(scores.dtype) / picked.sum(0).clamp(min=1)
