"""LoRAMoE."""

from moestro.balance.localised import LocalisedBalance
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert


@method(
    title="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
    paper="Dou et al. 2023",
    arxiv="2312.09979",
    family="dense",
)
def loramoe(experts: Experts, *, delta: float = 0.1, localised: float = 0.1) -> MoE:
    """A dense softmax router, and a balance that tells experts for one kind of data from those for the other.

    The loss needs `Context.domain`: 1 for samples that the first half of the experts should match, else 0; see
    `LocalisedBalance` for the sign of `delta`.
    """
    router = TokenChoice(
        Linear(experts.width, experts.num_experts), EveryExpert(experts.num_experts), softmax, as_is
    )
    return MoE(router, experts, losses={"localised": (localised, LocalisedBalance(delta))})
