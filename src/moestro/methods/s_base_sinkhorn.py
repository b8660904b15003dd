"""S-BASE: Sinkhorn routing."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, SinkhornInTraining, TokenChoice, as_is, sigmoid_of_selected, softmax


@method(
    title="Unified Scaling Laws for Routed Language Models",
    paper="Clark et al. 2022",
    arxiv="2202.01169",
    family="token-choice",
    causal=False,
)
def s_base_sinkhorn(experts: Experts, *, top_k: int = 1, tolerance: float = 1e-4) -> MoE:
    """Training takes the best entries of an entropic transport plan; evaluation is greedy. No loss is needed.

    Weights come from the logits, not from the plan: the sigmoid of the chosen one for top_k=1, softmax
    probabilities for more. The plan looks at later tokens, so training is not causal; evaluation is.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=SinkhornInTraining(top_k, tolerance),
        weigh=sigmoid_of_selected if top_k == 1 else as_is,
    )
    return MoE(router, experts)
