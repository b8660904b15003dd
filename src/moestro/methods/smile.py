"""SMILE."""

from functools import partial

from moestro.balance import GroupBalance, PlaceBalance
from moestro.balance.levels import group_size
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import DropByPosition, TokenChoice, TopK, TwoLevels, as_is, slots_of_choices, softmax


@method(
    title="SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing",
    paper="He et al. 2022",
    arxiv="2212.05191",
    family="token-choice",
    batch_independent=False,
)
def smile(
    experts: Experts,
    *,
    num_nodes: int = 1,
    capacity_factor: float = 1.25,
    node_balance: float = 1e-2,
    place_balance: float = 1e-2,
) -> MoE:
    """First a node, then a place in it: two small routers instead of a large one, each balanced.

    The weight is the product of both probabilities; all nodes share the inner router. One node is switch.
    """
    per_node = group_size(experts.num_experts, num_nodes)
    router = TokenChoice(
        scorer=TwoLevels(experts.width, num_nodes, per_node),
        gate=softmax,
        select=TopK(1),
        weigh=as_is,
        capacity=DropByPosition(partial(slots_of_choices, factor=capacity_factor, k=1)),
    )
    losses: dict[str, tuple[float, Loss]] = {
        "node_balance": (node_balance, GroupBalance(num_nodes)),
        "place_balance": (place_balance, PlaceBalance(num_nodes)),
    }
    return MoE(router, experts, losses=losses)
