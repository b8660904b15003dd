"""X-MoE."""

from moestro.balance import AtTemperature
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Cosine, LearnedTemperature, TokenChoice, TopK, as_is


@method(
    title="On the Representation Collapse of Sparse Mixture of Experts",
    paper="Chi et al. 2022",
    arxiv="2204.09179",
    family="token-choice",
)
def x_moe(
    experts: Experts,
    *,
    dimensions: int | None = None,
    temperature: float = 0.3,
    balance_temperature: float = 0.07,
    balance: float = 1e-2,
) -> MoE:
    """One expert per token by cosine similarity in half as many dimensions as experts, at a learned temperature.

    The weight is the softmax probability; the balance loss uses probabilities at a fixed temperature. The released
    code rescales embeddings in place and leaves tokens unnormalised; this is the paper's form.
    """
    router = TokenChoice(
        scorer=Cosine(experts.width, experts.num_experts, dimensions),
        gate=LearnedTemperature(temperature),
        select=TopK(1),
        weigh=as_is,
    )
    return MoE(router, experts, losses={"balance": (balance, AtTemperature(balance_temperature))})
