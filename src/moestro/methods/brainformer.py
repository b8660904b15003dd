"""Brainformers."""

from typing import Literal

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.expert_choice import expert_choice
from moestro.methods.gshard_top2 import gshard_top2
from moestro.methods.registry import method


@method(
    title="Brainformers: Trading Simplicity for Efficiency",
    paper="Zhou et al. 2023",
    arxiv="2306.00008",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def brainformer(
    experts: Experts,
    *,
    gating: Literal["token", "expert"] = "token",
    capacity_factor: float = 2.0,
    balance: float | None = None,
) -> MoE:
    """One sparse layer of a searched block: GShard's top-2 or expert choice, whichever the search picked.

    `balance` is the coefficient of top-2's loss, 0.01 by default; expert choice has none. Expert choice in a causal
    decoder sees later tokens.
    """
    if gating == "token":
        return gshard_top2(experts, capacity_factor=capacity_factor, balance=1e-2 if balance is None else balance)
    if balance is not None:
        raise ValueError(f"balance={balance} has no effect on gating='expert', whose load is even; leave it out")
    return expert_choice(experts, capacity_factor=capacity_factor)
