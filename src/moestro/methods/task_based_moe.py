"""Task-based mixture of experts."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, Renormalised, TokenChoice, TopK, softmax
from moestro.routers.views import SeesBoth


@method(
    title="Task-Based MoE for Multitask Multilingual Machine Translation",
    paper="Pham et al. 2023",
    arxiv="2308.15772",
    family="token-choice",
)
def task_based_moe(
    experts: Experts, *, num_domains: int, task_size: int = 64, top_k: int = 2, balance: float = 1e-2
) -> MoE:
    """The gate reads the token and an embedding of its task, `Context.domain`.

    Embeddings start at zero: a plain token router. Tasks that share an id share a gate. The paper's exact gate is
    not known to us; its task adapters are a layer of their own.
    """
    linear = Linear(experts.width + task_size, experts.num_experts)
    scorer = SeesBoth(linear, task_size, num_domains)
    router = TokenChoice(scorer, TopK(top_k), softmax, Renormalised(epsilon=1e-9))
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
