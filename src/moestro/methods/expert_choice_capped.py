"""Expert Choice with a bound on experts per token."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import ExpertChoice, Linear
from moestro.routers.groups import CappedShare
from moestro.routers.plans import Capped


@method(
    title="Mixture-of-Experts with Expert Choice Routing",
    paper="Zhou et al. 2022",
    arxiv="2202.09368",
    family="expert-choice",
    causal=False,
    batch_independent=False,
)
def expert_choice_capped(
    experts: Experts,
    *,
    capacity_factor: float = 2.0,
    max_experts: int = 3,
    entropy: float = 1e-3,
    sweeps: int = 300,
) -> MoE:
    """Expert choice in which a token gets at most `max_experts` experts, by an entropy-regularised linear program.

    The plan only selects (section 3.2); weights are the raw softmax. Rounding the plan to each expert's best tokens
    may exceed the bound for a few of them.
    """
    slots = CappedShare(capacity_factor, max_experts)
    router = ExpertChoice(
        Linear(experts.width, experts.num_experts), slots, affinity=Capped(max_experts, entropy, sweeps)
    )
    return MoE(router, experts)
