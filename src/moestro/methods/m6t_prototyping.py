"""M6-T expert prototyping."""

from functools import partial

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, GroupSoftmax, Linear, OnePerGroup, TokenChoice, as_is, slots_of_choices


@method(
    title="M6-T: Exploring Sparse Expert Models and Beyond",
    paper="Yang et al. 2021",
    arxiv="2105.15082",
    family="token-choice",
    batch_independent=False,
)
def m6t_prototyping(experts: Experts, *, top_k: int | None = None, capacity_factor: float = 1.25) -> MoE:
    """Experts in k groups, the best one of each group for every token, outputs added; no balance loss.

    Probabilities are within a group. An expert takes ceil(capacity_factor * k * tokens / experts), earlier tokens
    first; groups do not compete, so this is causal. `top_k` must divide the experts; by default two groups (one
    for an odd number of experts).
    """
    groups = top_k if top_k is not None else 2 - experts.num_experts % 2
    select = OnePerGroup(groups)
    select.check(experts.num_experts)
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=GroupSoftmax(groups),
        select=select,
        weigh=as_is,
        capacity=DropByPosition(partial(slots_of_choices, factor=capacity_factor, k=groups)),
    )
    return MoE(router, experts)
