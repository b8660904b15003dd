"""Language-specific sublayers."""

import torch

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import HashRouter
from moestro.routers.ids import by_domain
from moestro.routers.rerouted import Rerouted


@method(
    title="Beyond English-Centric Multilingual Machine Translation",
    paper="Fan et al. 2020",
    arxiv="2010.11125",
    family="fixed",
)
def m2m100(experts: Experts, *, group_of_language: list[int] | None = None, reroute: float = 0.0) -> MoE:
    """One sublayer per group of languages, with weight one; now and then a batch goes to another group's.

    Languages are the ids in `Context.domain`: of the source in an encoder, of the target in a decoder.
    `group_of_language` names the group (expert) of each; by default every language is a group of its own.
    """
    num_experts = experts.num_experts
    groups = list(range(num_experts)) if group_of_language is None else group_of_language
    router = HashRouter(torch.as_tensor(groups).view(1, -1), num_experts, by_domain)
    return MoE(Rerouted(router, reroute) if reroute else router, experts)
