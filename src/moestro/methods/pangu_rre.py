"""Random routed experts."""

import torch

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import HashRouter
from moestro.routers.ids import ByDomainAndToken
from moestro.routers.tables import random_table


@method(
    title="PanGu-Sigma: Towards Trillion Parameter Language Model with Sparse Heterogeneous Computing",
    paper="Ren et al. 2023",
    arxiv="2303.10845",
    family="fixed",
)
def pangu_rre(experts: Experts, *, vocab_size: int, num_domains: int = 4, seed: int = 42) -> MoE:
    """The domain names a group of experts, a frozen random table of token ids the expert in it; nothing is learned.

    Domain d uses experts d E/D to (d + 1) E/D - 1 only, so its sub-model can be taken out alone. Needs
    `Context.domain` and `Context.token_ids`.
    """
    if num_domains < 1 or experts.num_experts % num_domains:
        raise ValueError(
            f"num_domains={num_domains} does not divide {experts.num_experts} experts; choose a divisor"
        )
    group = experts.num_experts // num_domains
    tables = [random_table(vocab_size, group, seed + domain) + domain * group for domain in range(num_domains)]
    table = torch.cat(tables).unsqueeze(0)
    return MoE(HashRouter(table, experts.num_experts, ByDomainAndToken(num_domains)), experts)
