"""Whether a balance loss can act on a router at all."""

from __future__ import annotations

from moestro.balance.adaptive import AdaptiveLoss
from moestro.balance.levels import GroupBalance
from moestro.balance.loss import PerSequence
from moestro.balance.losses import LoadTimesProbability, UnbiasedBalance, Variation
from moestro.balance.steps import WhenSparse
from moestro.routers import Router


def idle_reason(loss: object, router: Router) -> str | None:
    """Why a loss gives the router no gradient whatever its scores, or None if it does as far as is known."""
    while isinstance(loss, AdaptiveLoss | PerSequence | WhenSparse):
        loss = loss.loss
    if not isinstance(loss, LoadTimesProbability | UnbiasedBalance | GroupBalance | Variation):
        return None
    if router.num_experts == 1:
        return "there is a single expert"
    if isinstance(loss, GroupBalance) and loss.num_groups == 1:
        return "there is a single group"
    first_only = isinstance(loss, LoadTimesProbability) and loss.convention == "switch"
    if router.top_k >= router.num_experts and not first_only and not isinstance(loss, Variation):
        return f"every token takes all {router.num_experts} experts, so that the load is always even"
    return None
