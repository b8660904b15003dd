"""GShard."""

from functools import partial
from typing import Literal

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPosition,
    Dropless,
    Linear,
    RandomSecond,
    Renormalised,
    TokenChoice,
    TopK,
    gshard_slots,
    softmax,
)


@method(
    title="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
    paper="Lepikhin et al. 2020",
    arxiv="2006.16668",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def gshard_top2(
    experts: Experts,
    *,
    capacity_factor: float | None = 2.0,
    second: Literal["random", "all"] = "random",
    balance: float = 1e-2,
) -> MoE:
    """Two experts per token, the second one kept at random by its weight, with a fixed capacity.

    The two weights are normalised before any drop; capacity = capacity_factor * ceil(tokens / experts); the loss
    counts first choices only. A later token's first choice goes before an earlier token's second one, so a
    capacity that binds is not causal: `capacity_factor=None` drops nothing and is. A single expert has no second
    choice (its gate value would be 0), so that the layer is that expert.
    """
    k = min(2, experts.num_experts)
    select = RandomSecond(TopK(2)) if second == "random" and k == 2 else TopK(k)
    capacity = (
        Dropless() if capacity_factor is None else DropByPosition(partial(gshard_slots, factor=capacity_factor))
    )
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=select,
        weigh=Renormalised(epsilon=1e-9),
        capacity=capacity,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
