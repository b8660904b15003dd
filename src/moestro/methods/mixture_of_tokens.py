"""Mixture of Tokens."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear
from moestro.routers.token_mixing import Emission, TokenMixing


@method(
    title="Mixture of Tokens: Continuous MoE through Cross-Example Aggregation",
    paper="Antoniak et al. 2023",
    arxiv="2310.15961",
    family="soft",
    batch_independent=False,
)
def mixture_of_tokens(
    experts: Experts, *, group_size: int = 32, temperature: float = 1.0, emission: Emission = "same"
) -> MoE:
    """Every expert reads one mixture of the tokens at the same position of several sequences; nothing is dropped.

    Needs `Context.position` and `sequence`, which a batch `[batch, length, width]` has by itself. A batch of one
    mixes nothing: adapt the model to that at the end of training before it generates.
    """
    scorer = Linear(experts.width, experts.num_experts)
    return MoE(TokenMixing(scorer, group_size, temperature, emission), experts)
