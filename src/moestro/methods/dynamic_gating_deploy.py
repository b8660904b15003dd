"""Dynamic gating for deployment."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, Linear, Renormalised, TokenChoice, TopK, gshard_slots, softmax
from moestro.routers.capacities import InTraining


@method(
    title="Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference",
    paper="Huang et al. 2023",
    arxiv="2303.06182",
    family="token-choice",
    causal=False,
)
def dynamic_gating_deploy(experts: Experts, *, capacity_factor: float = 2.0, balance: float = 1e-2) -> MoE:
    """Trained as GShard with a fixed capacity, run with exact sizes: evaluation pads nothing and drops nothing.

    Choices and weights are those of the trained gate; outputs no longer depend on the batch, and differ from the
    capacity-limited model where that would have dropped.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(2),
        weigh=Renormalised(epsilon=1e-9),
        capacity=InTraining(DropByPosition(partial(gshard_slots, factor=capacity_factor))),
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
