"""Vision MoE."""

from functools import partial
from typing import Literal

from moestro.balance import softmax_importance_cv_squared, threshold_load_cv_squared
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPosition,
    DropByPriority,
    FixedNoise,
    Linear,
    TokenChoice,
    TopK,
    as_is,
    slots_in_fours,
    softmax,
)


@method(
    title="Scaling Vision with Sparse Mixture of Experts",
    paper="Riquelme et al. 2021",
    arxiv="2106.05974",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def v_moe(
    experts: Experts,
    *,
    top_k: int = 2,
    capacity_factor: float = 1.05,
    priority: Literal["position", "batch"] = "position",
    noise: float = 1.0,
    importance: float = 5e-3,
    load: float = 5e-3,
) -> MoE:
    """Softmax before top-k, raw weights, small fixed noise, two losses and a capacity for patches.

    Noise has standard deviation noise / experts. With `priority="batch"` tokens of the largest weight go first
    (batch-prioritised routing), so that a capacity factor below 1 skips the patches that matter least.
    """
    num_experts = experts.num_experts
    drop = {"position": DropByPosition, "batch": DropByPriority}[priority]
    router = TokenChoice(
        scorer=Linear(experts.width, num_experts),
        noise=FixedNoise(noise / num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
        capacity=drop(partial(slots_in_fours, factor=capacity_factor, k=top_k)),
    )
    losses = {
        "importance": (importance, softmax_importance_cv_squared),
        "load": (load, threshold_load_cv_squared),
    }
    return MoE(router, experts, losses=losses)
