"""The sparsely-gated layer in two levels."""

import math

from moestro.balance import importance_cv_squared, noted_load_cv_squared
from moestro.balance.levels import group_size
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import TwoLevelNoisy


@method(
    title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    paper="Shazeer et al. 2017",
    arxiv="1701.06538",
    family="token-choice",
)
def shazeer_hierarchical(
    experts: Experts,
    *,
    num_groups: int | None = None,
    groups_per_token: int | None = None,
    experts_per_group: int | None = None,
    noise_floor: float = 1e-2,
    importance: float = 0.1,
    load: float = 0.1,
) -> MoE:
    """A noisy top-k gate over groups, and one over the experts of each chosen group; weights multiply.

    By default as many groups as the largest divisor of the experts below their square root, two of them per token
    and two experts of each (fewer if there are fewer). The paper has a group per device.
    """
    total = experts.num_experts
    if num_groups is None:
        num_groups = max(n for n in range(1, math.isqrt(total) + 1) if total % n == 0)
    per_group = group_size(total, num_groups)
    k1 = min(2, num_groups) if groups_per_token is None else groups_per_token
    k2 = min(2, per_group) if experts_per_group is None else experts_per_group
    router = TwoLevelNoisy(experts.width, num_groups, per_group, k1, k2, noise_floor)
    losses = {"importance": (importance, importance_cv_squared), "load": (load, noted_load_cv_squared)}
    return MoE(router, experts, losses=losses)
