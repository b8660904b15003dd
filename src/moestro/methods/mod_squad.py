"""Mod-Squad."""

from moestro.balance import TaskInformation
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import PerDomainNoise, TokenChoice, TopK, as_is, softmax
from moestro.routers.domain_scorers import PerDomainLinear


@method(
    title="Mod-Squad: Designing Mixtures of Experts As Modular Multi-Task Learners",
    paper="Chen et al. 2023",
    arxiv="2212.08066",
    family="token-choice",
)
def mod_squad(experts: Experts, *, num_domains: int, top_k: int = 4, information: float = 5e-4) -> MoE:
    """A noisy top-k gate for every task over common experts, and a loss that ties tasks to experts.

    The loss is minus the mutual information of task (`Context.domain`) and expert, of one call; the paper adds up
    the whole step. Noise is for training only (the released code forgets to switch it off).
    """
    width, num_experts = experts.width, experts.num_experts
    router = TokenChoice(
        scorer=PerDomainLinear(width, num_experts, num_domains, std=0.0),
        noise=PerDomainNoise(width, num_experts, num_domains),
        gate=softmax,
        select=TopK(top_k),
        weigh=as_is,
    )
    return MoE(router, experts, losses={"information": (information, TaskInformation(num_domains))})
