"""Quantile balancing."""

from moestro.balance import QuantileBias
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import BiasedSelection, Linear, Renormalised, TokenChoice, TopK, sigmoid


@method(
    title="Megatron Core: quantile balancing of experts",
    paper="NVIDIA 2025",
    family="token-choice",
)
def quantile_balancing(experts: Experts, *, top_k: int = 4, rate: float = 0.5) -> MoE:
    """Loss-free balancing whose bias is set by the quantile of each expert's margins, not by small steps.

    Sigmoid scores, weights normalised to one, no balance loss. After the option of that name in Megatron-LM, for
    which there is no paper; with one choice too many for a bias to act (top_k = experts) it refuses.
    """
    select = BiasedSelection(TopK(top_k), experts.num_experts)
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=sigmoid,
        select=select,
        weigh=Renormalised(),
    )
    return MoE(router, experts, controllers=[QuantileBias(select, rate)])
