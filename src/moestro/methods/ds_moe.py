"""Dense training, sparse inference."""

from moestro.balance.information import token_information
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax
from moestro.routers.dense import Above, EveryExpert, TrainEvaluate


@method(
    title="Dense Training, Sparse Inference: Rethinking Training of Mixture-of-Experts Language Models",
    paper="Pan et al. 2024",
    arxiv="2404.05567",
    family="dense",
)
def ds_moe(
    experts: Experts, *, top_k: int | None = 8, threshold: float | None = None, information: float = 4e-4
) -> MoE:
    """All experts train on every token; evaluation keeps the best `top_k`, or all above a `threshold`.

    Weights are raw softmax scores in both (eqs. 3-5). The loss, minus the mutual information of token and expert,
    makes scores concentrated and balanced; the paper's coefficients run from 6.3e-4 (1B) to 2e-4 (6B).
    """
    num_experts = experts.num_experts
    if (top_k is None) == (threshold is None):
        raise ValueError(f"choose one of top_k and threshold, got top_k={top_k} and threshold={threshold}")
    evaluate = Above(num_experts, threshold) if top_k is None else TopK(top_k)  # type: ignore[arg-type]
    router = TokenChoice(
        scorer=Linear(experts.width, num_experts),
        gate=softmax,
        select=TrainEvaluate(EveryExpert(num_experts), evaluate),
        weigh=as_is,
    )
    return MoE(router, experts, losses={"information": (information, token_information)})
