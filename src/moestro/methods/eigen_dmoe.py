"""Deep mixtures of experts."""

from moestro.balance.overload import CountCarried
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers.gate_networks import TwoLayer
from moestro.routers.overload import OverloadGuard


@method(
    title="Learning Factored Representations in a Deep Mixture of Experts",
    paper="Eigen et al. 2013",
    arxiv="1312.4314",
    family="dense",
)
def eigen_dmoe(
    experts: Experts, *, gate_hidden: int = 50, margin: float = 30.0, constrained_steps: int | None = 2000
) -> MoE:
    """A dense mixture under a two-layer gate; early in training, experts that lead by too much are left out.

    `margin` is the lead allowed, in minibatches; after `constrained_steps` of them the gate is free. Stack two
    such layers for the paper's network. The paper gives neither number.
    """
    scorer = TwoLayer(experts.width, experts.num_experts, gate_hidden)
    return MoE(OverloadGuard(scorer, margin, constrained_steps), experts, controllers=[CountCarried()])
