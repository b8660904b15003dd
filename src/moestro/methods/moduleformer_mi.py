"""ModuleFormer."""

from moestro.balance.information import token_information
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import GeluNetwork, SampledTail, TokenChoice, as_is, softmax


@method(
    title="ModuleFormer: Modularity Emerges from Mixture-of-Experts",
    paper="Shen et al. 2023",
    arxiv="2306.04640",
    family="token-choice",
)
def moduleformer_mi(
    experts: Experts,
    *,
    top_k: int = 2,
    gate_hidden: int = 256,
    gate_dropout: float = 0.1,
    sampled: int = 0,
    information: float = 1e-3,
) -> MoE:
    """A small network as gate, raw weights, and a loss for experts that are used evenly and chosen surely.

    The loss is minus the mutual information of token and expert. In training the last `sampled` choices are drawn
    from the probabilities of the rest.
    """
    router = TokenChoice(
        scorer=GeluNetwork(experts.width, experts.num_experts, gate_hidden, gate_dropout),
        gate=softmax,
        select=SampledTail(top_k, sampled),
        weigh=as_is,
    )
    return MoE(router, experts, losses={"information": (information, token_information)})
