"""Classical mixtures of experts."""

from typing import Literal

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Scorer, TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routers.gate_networks import Affine, Densities, Tree


@method(
    title="Adaptive Mixtures of Local Experts",
    paper="Jacobs et al. 1991",
    family="dense",
)
def dense_softmax(
    experts: Experts, *, gate: Literal["affine", "densities"] = "affine", branches: int | None = None
) -> MoE:
    """All experts run on every token and a softmax weights them.

    Gates: `affine` (meta-pi, adaptive mixtures); affine in a tree of two levels with `branches` (hierarchical
    mixtures); `densities`, a Gaussian per expert whose posterior is the weight. The competitive and cooperative
    objectives need each expert's prediction: `moestro.balance.likelihood`.
    """
    width, num_experts = experts.width, experts.num_experts
    if branches is not None and gate != "affine":
        raise ValueError(f"branches={branches} has no effect on gate={gate!r}; a tree has affine gates")
    if branches is not None and (branches < 1 or num_experts % branches):
        raise ValueError(f"branches={branches} does not divide {num_experts} experts; choose a divisor")
    scorer: Scorer
    if gate == "densities":
        scorer = Densities(width, num_experts)
    elif branches is None:
        scorer = Affine(width, num_experts)
    else:
        scorer = Tree(width, (branches, num_experts // branches))
    return MoE(TokenChoice(scorer, EveryExpert(num_experts), softmax, as_is), experts)
