"""DBRX."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import InputJitter, Linear, Normed, TokenChoice, TopK, as_is, softmax


@method(
    title="Introducing DBRX: A New State-of-the-Art Open LLM",
    paper="Databricks 2024",
    family="token-choice",
)
def dbrx(
    experts: Experts, *, top_k: int = 4, norm: float | None = 1.0, jitter: float = 0.0, balance: float = 0.05
) -> MoE:
    """Four of sixteen experts, weighted by their probabilities divided by a norm; nothing is dropped.

    `norm` is the order: 1 makes weights sum to one, 2 their squares, None leaves them raw. The released trainer
    divides the balance loss by the number of MoE layers; here each layer adds its own.
    """
    scorer = Linear(experts.width, experts.num_experts)
    router = TokenChoice(
        scorer=InputJitter(scorer, jitter) if jitter else scorer,
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is if norm is None else Normed(norm),
    )
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("megatron"))})
