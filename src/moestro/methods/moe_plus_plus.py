"""MoE++."""

from functools import partial

from moestro.balance import DearExperts
from moestro.experts import ConcatExperts, ConstantExperts, CopyExperts, Experts, ZeroExperts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import (
    DropByPositionPerExpert,
    Dropless,
    GatingResidual,
    Linear,
    TokenChoice,
    TopK,
    as_is,
    slots_by_price,
    softmax,
)


@method(
    title="MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
    paper="Jin et al. 2024",
    arxiv="2410.07348",
    family="token-choice",
    name="moe-plus-plus",
)
def moe_plus_plus(
    experts: Experts,
    *,
    top_k: int = 2,
    zero: int = 1,
    copy: int = 1,
    constant: int | None = None,
    tau: float = 0.75,
    capacity_factor: float | None = None,
    balance: float = 1e-2,
) -> MoE:
    """Beside the experts some cost nothing: zero discards a token, copy skips the layer, constant answers a vector.

    Routers add the previous layer's logits through a learned map (`Context.previous`). Free experts are cheaper by
    `tau` in the balance loss and have 1/tau as many slots. The paper trains with capacity_factor 1.1, which is not
    causal; by default nothing is dropped. `constant` defaults to a quarter of the experts less the other two.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau={tau} must be above 0 and at most 1")
    if constant is None:
        constant = max(experts.num_experts // 4 - zero - copy, 1)
    free = zero + copy + constant
    if min(zero, copy, constant) < 0 or not free:
        raise ValueError(f"zero={zero}, copy={copy}, constant={constant} must not be negative, nor all be 0")
    width = experts.width
    kinds = [ZeroExperts(zero, width), CopyExperts(copy, width), ConstantExperts(constant, width)]
    bank = ConcatExperts([experts, *(kind for kind in kinds if kind.num_experts)])
    dear = experts.num_experts
    slots = partial(slots_by_price, k=top_k, dear=dear, free=free, tau=tau)
    router = TokenChoice(
        scorer=GatingResidual(Linear(experts.width, bank.num_experts)),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
        capacity=Dropless()
        if capacity_factor is None
        else DropByPositionPerExpert(partial(slots, factor=capacity_factor)),
    )
    prices = DearExperts((1.0,) * dear + (tau,) * free)
    return MoE(router, bank, losses={"balance": (balance, prices)})
