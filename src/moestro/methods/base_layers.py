"""BASE layers."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import BalancedAssignment, Linear, TokenChoice, sigmoid_of_selected, softmax


@method(
    title="BASE Layers: Simplifying Training of Large, Sparse Models",
    paper="Lewis et al. 2021",
    arxiv="2103.16716",
    family="token-choice",
    causal=False,
)
def base_layers(experts: Experts) -> MoE:
    """Training solves for the best assignment of equally many tokens to every expert; evaluation is greedy.

    The weight is the sigmoid of the chosen logit: with the residual around the layer that is the paper's
    interpolation of an expert block with the identity. No loss is needed. The assignment looks at later tokens, so
    training is not causal; evaluation is.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=BalancedAssignment(),
        weigh=sigmoid_of_selected,
    )
    return MoE(router, experts)
