"""Balance over the global batch."""

from moestro.balance import GlobalBatchBalance
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, Renormalised, TokenChoice, TopK, softmax


@method(
    title="Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
    "Mixture-of-Expert Models",
    paper="Qiu et al. 2025",
    arxiv="2501.11873",
    family="token-choice",
)
def global_batch_balance(experts: Experts, *, top_k: int = 4, balance: float = 1e-2) -> MoE:
    """Top-k routing whose balance loss counts the choices of all ranks, so that a sequence may use few experts."""
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=Renormalised(),
    )
    return MoE(router, experts, losses={"balance": (balance, GlobalBatchBalance())})
