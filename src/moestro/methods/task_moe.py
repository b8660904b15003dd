"""Task-level mixture of experts."""

from functools import partial
from typing import Literal

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPosition,
    Dropless,
    Linear,
    Renormalised,
    Scorer,
    TokenChoice,
    TopK,
    gshard_slots,
    softmax,
)
from moestro.routers.views import SeesDomain, SeesSequence


@method(
    title="Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference",
    paper="Kudugunta et al. 2021",
    arxiv="2110.03742",
    family="token-choice",
)
def task_moe(
    experts: Experts,
    *,
    num_domains: int,
    see: Literal["task", "sentence", "token"] = "task",
    capacity_factor: float | None = None,
    balance: float = 1e-2,
) -> MoE:
    """GShard's two experts, chosen by the task (or the sentence) instead of the token.

    Tasks are the ids in `Context.domain`, e.g. the target language; only a task's two experts need be deployed.
    Both choices are kept and none dropped: a task's tokens are treated alike. `num_domains` has no
    effect unless `see="task"`: pass 1. The balance loss counts tokens, not tasks.
    """
    if see != "task" and num_domains != 1:
        raise ValueError(f"num_domains={num_domains} has no effect on see={see!r}; pass num_domains=1")
    width = experts.width
    linear = Linear(width, experts.num_experts)
    views: dict[str, Scorer] = {"sentence": SeesSequence(linear), "token": linear}
    scorer = SeesDomain(linear, width, num_domains) if see == "task" else views[see]
    drop = Dropless() if capacity_factor is None else DropByPosition(partial(gshard_slots, factor=capacity_factor))
    router = TokenChoice(scorer, TopK(2), softmax, Renormalised(epsilon=1e-9), capacity=drop)
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
