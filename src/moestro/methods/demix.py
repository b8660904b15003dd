"""DEMix layers."""

import torch

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import HashRouter
from moestro.routers.ids import by_domain


@method(
    title="DEMix Layers: Disentangling Domains for Modular Language Modeling",
    paper="Gururangan et al. 2021",
    arxiv="2108.05036",
    family="fixed",
)
def demix(experts: Experts) -> MoE:
    """One expert per domain: all tokens of a document go to the expert of its domain, with weight one.

    Needs `Context.domain`. To predict a text of unknown domain, run the model once per domain and mix the
    predictions: `moestro.routers.posterior`.
    """
    return MoE(HashRouter(torch.arange(experts.num_experts).unsqueeze(0), experts.num_experts, by_domain), experts)
