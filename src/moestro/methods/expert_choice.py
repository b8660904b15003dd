"""Expert Choice."""

from moestro.balance.depth import depth_loss
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import ExpertChoice, Linear
from moestro.routers.predicted import PredictedChoice


@method(
    title="Mixture-of-Experts with Expert Choice Routing",
    paper="Zhou et al. 2022",
    arxiv="2202.09368",
    family="expert-choice",
    causal=False,
    batch_independent=False,
)
def expert_choice(experts: Experts, *, capacity_factor: float = 2.0, predict: float | None = None) -> MoE:
    """Each expert takes the tokens that score highest for it: even load, a varying number of experts per token.

    The group is all tokens of the call; weights are the raw softmax over experts; no loss is needed. `predict` is
    the loss coefficient of a small network that guesses who picks a token and decides in evaluation, which is then
    causal (training is not: it looks at later tokens); None = no such network.
    """
    router = ExpertChoice(Linear(experts.width, experts.num_experts), capacity_factor)
    if predict is None:
        return MoE(router, experts)
    return MoE(PredictedChoice(router, experts.width), experts, losses={"prediction": (predict, depth_loss)})
