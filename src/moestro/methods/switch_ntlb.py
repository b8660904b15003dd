"""No token left behind."""

from functools import partial

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import InputJitter, Linear, RetryByPosition, TokenChoice, TopK, as_is, softmax, switch_slots


@method(
    title="Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    paper="Fedus et al. 2021",
    arxiv="2101.03961",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def switch_ntlb(
    experts: Experts,
    *,
    passes: int | None = None,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    jitter: float = 1e-2,
    balance: float = 1e-2,
) -> MoE:
    """Switch, except that a token whose expert is full tries its next best, several times (appendix B).

    `passes` choices are tried, by default four (or all experts if there are fewer); a token ends with at most one
    expert, weighted by its raw probability. The balance loss counts all choices that may be tried.
    """
    slots = partial(partial, switch_slots, minimum=min_capacity)
    router = TokenChoice(
        scorer=InputJitter(Linear(experts.width, experts.num_experts), jitter),
        gate=softmax,
        select=TopK(min(4, experts.num_experts) if passes is None else passes),
        weigh=as_is,
        capacity=RetryByPosition(slots(factor=capacity_factor), slots(factor=eval_capacity_factor)),
    )
    router.top_k = 1
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("megatron"))})
