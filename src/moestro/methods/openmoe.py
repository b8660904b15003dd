"""OpenMoE."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.methods.st_moe import st_moe


@method(
    title="OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
    paper="Xue et al. 2024",
    arxiv="2402.01739",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def openmoe(
    experts: Experts,
    *,
    capacity_factor: float | None = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    shared_experts: int = 1,
    balance: float = 1e-2,
    z: float = 1e-4,
) -> MoE:
    """ST-MoE's gate without noise on its input, beside a dense network that is always on.

    Drops fall on late positions. The released code has z = 1e-4, the paper 1e-3. `capacity_factor=None` drops
    nothing and is causal.
    """
    moe = st_moe(
        experts,
        capacity_factor=capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        min_capacity=min_capacity,
        jitter=0.0,
        balance=balance,
        z=z,
    )
    shared = experts.dense(shared_experts) if shared_experts else None
    return MoE(moe.router, experts, shared, losses=moe.losses)
