"""Routing by reinforcement learning."""

from typing import Literal

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear
from moestro.routers.policy import Policy


@method(
    title="Unified Scaling Laws for Routed Language Models",
    paper="Clark et al. 2022",
    arxiv="2202.01169",
    family="token-choice",
)
def rl_router(experts: Experts, *, weight: Literal["probability", "one"] = "probability") -> MoE:
    """The router is a policy that samples one expert per token and is rewarded by the token's likelihood (RL-R).

    The reward is known only after the whole model has run: `moestro train` hands it to every router (objective
    `policy-gradient`), elsewhere add `moestro.balance.policy.policy_loss(decisions, reward)` to the objective.
    """
    router = Policy(Linear(experts.width, experts.num_experts), experts.width, weight)
    return MoE(router, experts)
