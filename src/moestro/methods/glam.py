"""GLaM."""

from typing import Literal

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.gshard_top2 import gshard_top2
from moestro.methods.registry import method


@method(
    title="GLaM: Efficient Scaling of Language Models with Mixture-of-Experts",
    paper="Du et al. 2022",
    arxiv="2112.06905",
    family="token-choice",
    causal=False,
    batch_independent=False,
)
def glam(
    experts: Experts,
    *,
    capacity_factor: float | None = 2.0,
    second: Literal["random", "all"] = "random",
    balance: float = 1e-2,
) -> MoE:
    """GShard's gate in a decoder: 64 experts in every other layer, two per token.

    `capacity_factor=None` drops nothing and is causal.
    """
    return gshard_top2(experts, capacity_factor=capacity_factor, second=second, balance=balance)
