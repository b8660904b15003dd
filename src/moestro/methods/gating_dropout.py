"""Gating Dropout."""

from moestro.balance import LoadTimesProbability
from moestro.balance.levels import group_size
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, SkipLayer, StayLocal, TokenChoice, TopK, as_is, softmax


@method(
    title="Gating Dropout: Communication-efficient Regularization for Sparsely Activated Transformers",
    paper="Liu et al. 2022",
    arxiv="2205.14336",
    family="token-choice",
)
def gating_dropout(
    experts: Experts, *, top_k: int = 1, rate: float = 0.2, num_devices: int | None = None, balance: float = 1e-2
) -> MoE:
    """Top-k routing that now and then, in training, sends nothing over the network.

    With `num_devices` tokens then stay on their device and use the expert of the same place there (Gate-Drop, the
    paper's rate is 0.3); by default the whole layer is skipped (Gate-Expert-Drop, 0.2). All ranks draw alike.
    """
    group_size(experts.num_experts, num_devices or 1)
    if num_devices is not None and top_k > 1:
        raise ValueError(f"Gate-Drop could send a token twice to one expert with top_k={top_k}; pass top_k=1")
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
        capacity=SkipLayer(rate) if num_devices is None else StayLocal(rate, num_devices),
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
