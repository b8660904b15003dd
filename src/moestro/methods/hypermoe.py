"""HyperMoE."""

from moestro.balance import importance_cv_squared, load_cv_squared
from moestro.experts import Experts
from moestro.experts.hyper import HyperExperts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import GaussianNoise, Linear, Renormalised, TokenChoice, TopK, as_is, softmax


@method(
    title="HyperMoE: Towards Better Mixture of Experts via Transferring Among Experts",
    paper="Zhao et al. 2024",
    arxiv="2402.12656",
    family="token-choice",
)
def hypermoe(
    experts: Experts,
    *,
    top_k: int = 2,
    adapter_rank: int = 8,
    embedding_size: int = 32,
    hyper_hidden: int = 64,
    importance: float = 1e-2,
    load: float = 1e-2,
) -> MoE:
    """Noisy top-k, plus an adapter that a hypernetwork makes from the experts a token did not choose.

    Weights are the chosen softmax scores renormalised; a single choice keeps its score, so that the router learns.
    Sizes of the hypernetwork are ours; the paper runs k = 1.
    """
    width, num_experts = experts.width, experts.num_experts
    router = TokenChoice(
        scorer=Linear(width, num_experts),
        noise=GaussianNoise(width, num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=Renormalised() if top_k > 1 else as_is,
    )
    bank = HyperExperts(experts, embedding_size, hyper_hidden, adapter_rank)
    losses = {"importance": (importance, importance_cv_squared), "load": (load, load_cv_squared)}
    return MoE(router, bank, losses=losses)
