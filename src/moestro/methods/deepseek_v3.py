"""DeepSeek-V3."""

from moestro.balance import LossFreeBias, SequenceBalance
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import BiasedSelection, GroupLimitedTopK, Linear, Renormalised, TokenChoice, sigmoid


@method(title="DeepSeek-V3 Technical Report", paper="DeepSeek-AI 2024", arxiv="2412.19437", family="token-choice")
def deepseek_v3(
    experts: Experts,
    *,
    top_k: int = 8,
    num_groups: int = 1,
    groups_kept: int = 1,
    route_scale: float = 2.5,
    shared_experts: int = 1,
    bias_rate: float = 1e-3,
    sequence_balance: float = 1e-4,
) -> MoE:
    """Sigmoid scores, a bias that only selects, group-limited top-k, and shared experts beside the routed.

    A group's score is the sum of its two best biased scores; weights are unbiased scores normalised to
    `route_scale`; the bias moves by `bias_rate` after each step (loss-free balancing, arXiv 2408.15664). The paper
    has 8 groups of which 4 are kept; shared experts are one network as wide as all of them.
    """
    if shared_experts < 0:
        raise ValueError(f"shared_experts={shared_experts} must not be negative")
    num_experts = experts.num_experts
    select = GroupLimitedTopK(top_k, num_groups, groups_kept, best_of=2)
    router = TokenChoice(
        scorer=Linear(experts.width, num_experts),
        gate=sigmoid,
        select=BiasedSelection(select, num_experts),
        weigh=Renormalised(scale=route_scale),
    )
    return MoE(
        router,
        experts,
        experts.dense(shared_experts) if shared_experts else None,
        losses={"sequence_balance": (sequence_balance, SequenceBalance())},
        controllers=[LossFreeBias(bias_rate)] if bias_rate else [],
    )
