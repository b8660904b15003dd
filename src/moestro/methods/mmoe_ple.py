"""Multi-gate mixtures and progressive layered extraction."""

import torch

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import TokenChoice, as_is, softmax
from moestro.routers.dense import Above
from moestro.routers.domain_scorers import PerDomainLinear


@method(
    title="Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
    paper="Ma et al. 2018",
    family="dense",
)
def mmoe_ple(experts: Experts, *, num_domains: int, own_experts: int = 0) -> MoE:
    """One dense softmax gate per task, over shared experts (MMoE) or its own and the shared ones (PLE).

    Tasks are the ids in `Context.domain`. With `own_experts` n (Tang et al. 2020), task m uses experts m n to
    m n + n - 1 and those after all own ones; id `num_domains` is the branch between the tasks, whose gate sees all
    experts and feeds the next level.
    """
    num_experts, owned = experts.num_experts, own_experts * num_domains
    if own_experts < 0 or owned > num_experts:
        raise ValueError(
            f"{num_domains} tasks with own_experts={own_experts} need {owned} experts but there are {num_experts}"
        )
    pool = None
    if own_experts:
        expert, task = torch.arange(num_experts), torch.arange(num_domains).unsqueeze(1)
        pool = (expert >= owned) | (expert // own_experts == task)
        pool = torch.cat([pool, torch.ones(1, num_experts, dtype=torch.bool)])
    gates = num_domains if pool is None else num_domains + 1
    scorer = PerDomainLinear(experts.width, num_experts, gates, pool)
    return MoE(TokenChoice(scorer, Above(num_experts), softmax, as_is), experts)
