"""DeepSeekMoE."""

from moestro.balance import GroupBalance, LoadTimesProbability
from moestro.balance.levels import group_size
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax


@method(
    title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    paper="Dai et al. 2024",
    arxiv="2401.06066",
    family="token-choice",
)
def deepseekmoe(
    experts: Experts,
    *,
    top_k: int = 6,
    shared_experts: int = 2,
    balance: float = 1e-3,
    num_devices: int = 1,
    device_balance: float = 0.0,
) -> MoE:
    """Many fine-grained experts with raw probabilities as weights, beside shared experts that are always on.

    Probabilities are over the routed experts only. `device_balance` is for experts spread over `num_devices`
    (the largest model: 0.05 over 4); on one device that loss is constant.
    """
    if shared_experts < 0:
        raise ValueError(f"shared_experts={shared_experts} must not be negative")
    if device_balance and num_devices == 1:
        raise ValueError("device_balance on num_devices=1 is constant and cannot act; pass num_devices above 1")
    group_size(experts.num_experts, num_devices)
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    losses: dict[str, tuple[float, Loss]] = {
        "balance": (balance, LoadTimesProbability("megatron")),
        "device_balance": (device_balance, GroupBalance(num_devices)),
    }
    return MoE(router, experts, experts.dense(shared_experts) if shared_experts else None, losses=losses)
