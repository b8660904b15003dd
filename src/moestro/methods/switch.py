"""Switch Transformer."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, InputJitter, Linear, TokenChoice, TopK, as_is, softmax, switch_slots


@method(
    title="Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    paper="Fedus et al. 2021",
    arxiv="2101.03961",
    family="token-choice",
    batch_independent=False,
)
def switch(
    experts: Experts,
    *,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    jitter: float = 1e-2,
    balance: float = 1e-2,
) -> MoE:
    """One expert per token, weighted by its raw probability, with input jitter and a fixed capacity.

    capacity = capacity_factor * tokens / experts (eq. 3); balance loss = experts * sum_e f_e P_e (eqs. 4-6).
    Router weights start ten times smaller than usual: truncated normal of variance 0.1 / width (section 2.4).
    """
    scorer = Linear(experts.width, experts.num_experts, std=(0.1 / experts.width) ** 0.5)
    router = TokenChoice(
        scorer=InputJitter(scorer, jitter),
        gate=softmax,
        select=TopK(1),
        weigh=as_is,
        capacity=DropByPosition(
            partial(switch_slots, factor=capacity_factor, minimum=min_capacity),
            partial(switch_slots, factor=eval_capacity_factor, minimum=min_capacity),
        ),
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
