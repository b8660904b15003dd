"""Six routers of one study."""

from typing import Literal

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import ExpertChoice, Linear, Router, TokenChoice, TopK, as_is, softmax
from moestro.routers.expert_choice import Affinity, as_scored
from moestro.routers.planned import SinkhornSelection
from moestro.routers.plans import BySinkhorn, SparsityConstrained


@method(
    title="Routers in Vision Mixture of Experts: An Empirical Study",
    paper="Liu et al. 2024",
    arxiv="2401.15969",
    family="expert-choice",
    causal=False,
    batch_independent=False,
)
def routers_vision_study(
    experts: Experts,
    *,
    chooser: Literal["expert", "token"] = "expert",
    affinity: Literal["softmax", "sinkhorn", "sparse"] = "softmax",
    top_k: int = 2,
) -> MoE:
    """Tokens or experts choose, by softmax scores or by a transport plan; weights are softmax scores in all.

    A token has `top_k` experts, on average if experts choose.
    `sparse` is sparsity-constrained transport for expert choice. The study's sixth router is `soft-moe`.
    """
    scorer = Linear(experts.width, experts.num_experts)
    router: Router
    if chooser == "expert":
        plans: dict[str, Affinity] = {
            "softmax": as_scored,
            "sinkhorn": BySinkhorn(),
            "sparse": SparsityConstrained(),
        }
        router = ExpertChoice(scorer, top_k, affinity=plans[affinity])
    elif affinity == "sparse":
        raise ValueError("affinity='sparse' bounds the tokens of an expert: use it with chooser='expert'")
    else:
        select = TopK(top_k) if affinity == "softmax" else SinkhornSelection(TopK(top_k))
        router = TokenChoice(scorer, select, softmax, as_is)
    return MoE(router, experts)
