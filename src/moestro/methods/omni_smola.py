"""Omni-SMoLA."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear
from moestro.routers.modalities import ModalitySets


@method(
    title="Omni-SMoLA: Boosting Generalist Multimodal Models with Soft Mixture of Low-rank Experts",
    paper="Wu et al. 2023",
    arxiv="2312.00968",
    family="dense",
)
def omni_smola(experts: Experts, *, text: int | None = None, visual: int | None = None) -> MoE:
    """Dense softmaxes over three sets of low-rank experts: for all tokens, for visual and for text tokens.

    `text` and `visual` are the sizes of the two sets of their own, a third of the experts each by default; the
    others, first in the bank, serve all. `Context.domain` is 0 for text and 1 for visual tokens. Whether the paper
    mixes token by token or in slots is not certain to us; this is token by token.
    """
    third = experts.num_experts // 3
    own = [third if size is None else size for size in (text, visual)]
    sizes = [experts.num_experts - sum(own), *own]
    return MoE(ModalitySets(Linear(experts.width, experts.num_experts), sizes, (None, 0, 1), 2), experts)
