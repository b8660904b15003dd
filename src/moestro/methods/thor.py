"""THOR."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers.random_expert import Level, RandomExpert


@method(
    title="Taming Sparsely Activated Transformer with Stochastic Experts",
    paper="Zuo et al. 2021",
    arxiv="2110.04260",
    family="fixed",
)
def thor(experts: Experts, *, evaluate: Level = "token", seed: int = 0) -> MoE:
    """A random expert serves the whole batch; nothing is learned about routing.

    `moestro train` gives it two passes of each batch (objective `two-passes`), elsewhere use
    `moestro.balance.consistency.two_pass_objective`. Evaluation draws an expert for each token (needs
    `Context.token_ids` and `position`) or sentence (`sequence`).
    """
    return MoE(RandomExpert(experts.num_experts, evaluate, seed), experts)
