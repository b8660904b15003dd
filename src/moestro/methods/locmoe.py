"""LocMoE."""

from functools import partial

from moestro.balance import LoadTimesProbability, Locality
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import BlockMeans, DropByPosition, TokenChoice, TopK, as_is, locmoe_slots, softmax


@method(
    title="LocMoE: A Low-Overhead MoE for Large Language Model Training",
    paper="Li et al. 2024",
    arxiv="2401.13920",
    family="token-choice",
    batch_independent=False,
)
def locmoe(
    experts: Experts,
    *,
    delta: float = 0.03,
    num_devices: int = 1,
    balance: float = 1e-2,
    locality: float = 0.0,
) -> MoE:
    """One expert per token by the means of blocks of its features: a gate without parameters.

    The capacity is the paper's lower bound for features whose largest cosine with the gate is `delta`; `locality`
    pulls tokens to experts of their own device and needs `num_devices` above 1.
    """
    if locality and num_devices < 2:
        raise ValueError("locality cannot act on num_devices=1; pass num_devices above 1")
    router = TokenChoice(
        scorer=BlockMeans(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(1),
        weigh=as_is,
        capacity=DropByPosition(partial(locmoe_slots, width=experts.width, delta=delta)),
    )
    losses: dict[str, tuple[float, Loss]] = {"balance": (balance, LoadTimesProbability("switch"))}
    if num_devices > 1:
        losses["locality"] = (locality, Locality(num_devices))
    return MoE(router, experts, losses=losses)
