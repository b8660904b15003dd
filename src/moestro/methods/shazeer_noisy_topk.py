"""The sparsely-gated layer that began it."""

from moestro.balance import importance_cv_squared, load_cv_squared
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import GaussianNoise, Linear, TokenChoice, TopK, softmax, softmax_over_selected


@method(
    title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    paper="Shazeer et al. 2017",
    arxiv="1701.06538",
    family="token-choice",
)
def shazeer_noisy_topk(
    experts: Experts, *, top_k: int = 4, noise_floor: float = 1e-2, importance: float = 0.1, load: float = 0.1
) -> MoE:
    """The k best of noisy logits, a softmax over them, and two losses for equal importance and load.

    Router and noise weights start at zero, so that noise alone decides at first (appendix A).
    """
    width, num_experts = experts.width, experts.num_experts
    router = TokenChoice(
        scorer=Linear(width, num_experts, std=0),
        noise=GaussianNoise(width, num_experts, noise_floor),
        gate=softmax,
        select=TopK(top_k),
        weigh=softmax_over_selected,
    )
    losses = {"importance": (importance, importance_cv_squared), "load": (load, load_cv_squared)}
    return MoE(router, experts, losses=losses)
