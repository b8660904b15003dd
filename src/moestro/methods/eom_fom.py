"""Expert and final output masking."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Dropless, Linear, Renormalised, TokenChoice, TopK, softmax
from moestro.routers.masks import OutputMask, ScaledInEvaluation


@method(
    title="No Language Left Behind: Scaling Human-Centered Machine Translation",
    paper="NLLB team 2022",
    arxiv="2207.04672",
    family="token-choice",
)
def eom_fom(experts: Experts, *, top_k: int = 2, eom: float = 0.2, fom: float = 0.0, balance: float = 1e-2) -> MoE:
    """Top-2 gating whose experts' answers are masked at random: pair by pair (`eom`) or token by token (`fom`).

    Training does not rescale; evaluation multiplies by 1 - p instead. NLLB adds its losses up over layers.
    """
    masks = OutputMask(OutputMask(Dropless(), eom), fom, whole_token=True)
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=ScaledInEvaluation(Renormalised(epsilon=1e-9), (1 - eom) * (1 - fom)),
        capacity=masks,
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
