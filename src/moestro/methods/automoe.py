"""AutoMoE."""

from moestro.experts import ConcatExperts, Experts, make_experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.methods.switch import switch


@method(
    title="AutoMoE: Heterogeneous Mixture-of-Experts with Adaptive Computation for Efficient Neural Machine "
    "Translation",
    paper="Jawahar et al. 2022",
    arxiv="2210.07535",
    family="token-choice",
    batch_independent=False,
)
def automoe(
    experts: Experts,
    *,
    hidden_sizes: list[int] | None = None,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    balance: float = 1e-2,
) -> MoE:
    """Switch routing over experts of different hidden sizes, found by a search that is not part of the layer.

    `hidden_sizes` names the size of each expert and replaces the bank; without it this is Switch.
    """
    if hidden_sizes is not None:
        if len(hidden_sizes) != experts.num_experts:
            raise ValueError(f"hidden_sizes names {len(hidden_sizes)} experts but there are {experts.num_experts}")
        like = {name: getattr(experts, name) for name in ("activation", "bias", "kernel")}
        experts = ConcatExperts(make_experts(1, experts.width, size, **like) for size in hidden_sizes)
    return switch(
        experts, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor, balance=balance
    )
