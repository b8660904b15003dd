"""DeepSeek-V2."""

from moestro.balance import CommunicationBalance, GroupBalance, LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropLeastAffine,
    Dropless,
    GroupLimitedTopK,
    InTraining,
    Linear,
    Scaled,
    TokenChoice,
    softmax,
)


@method(
    title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    paper="DeepSeek-AI 2024",
    arxiv="2405.04434",
    family="token-choice",
)
def deepseek_v2(
    experts: Experts,
    *,
    top_k: int = 6,
    num_groups: int = 1,
    groups_kept: int = 1,
    route_scale: float = 16.0,
    shared_experts: int = 2,
    capacity_factor: float | None = None,
    protected: float = 0.1,
    balance: float = 3e-3,
    device_balance: float = 0.0,
    communication_balance: float = 0.0,
) -> MoE:
    """Experts on a few devices per token, weighted by raw scaled probabilities, with balance at three levels.

    Groups are devices (the paper: 8, of which a token uses 3; losses 0.003, 0.05, 0.02). `capacity_factor` (1 in
    the paper) gives each device a budget in training and drops the least affine choices, except in a `protected`
    share of the sequences; that is not causal, so by default nothing is dropped.
    """
    if num_groups == 1 and (device_balance or communication_balance or capacity_factor is not None):
        raise ValueError(
            "device_balance, communication_balance and capacity_factor cannot act on one group; raise num_groups"
        )
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=GroupLimitedTopK(top_k, num_groups, groups_kept, best_of=1),
        weigh=Scaled(route_scale),
        capacity=Dropless()
        if capacity_factor is None
        else InTraining(DropLeastAffine(num_groups, capacity_factor, protected)),
    )
    losses: dict[str, tuple[float, Loss]] = {
        "balance": (balance, LoadTimesProbability("megatron")),
        "device_balance": (device_balance, GroupBalance(num_groups)),
        "communication_balance": (communication_balance, CommunicationBalance(num_groups, groups_kept)),
    }
    return MoE(router, experts, experts.dense(shared_experts) if shared_experts else None, losses=losses)
