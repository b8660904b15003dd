"""Expert Choice."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import ExpertChoice, Linear


@method(
    title="Mixture-of-Experts with Expert Choice Routing",
    paper="Zhou et al. 2022",
    arxiv="2202.09368",
    family="expert-choice",
    causal=False,
    batch_independent=False,
)
def expert_choice(experts: Experts, *, capacity_factor: float = 2.0) -> MoE:
    """Each expert takes the tokens that score highest for it: even load, a varying number of experts per token.

    The group is all tokens of the call; weights are the raw softmax over experts; no loss is needed.
    """
    return MoE(ExpertChoice(Linear(experts.width, experts.num_experts), capacity_factor), experts)
