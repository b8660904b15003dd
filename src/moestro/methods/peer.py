"""PEER."""

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers.product_key import ProductKeys


@method(title="Mixture of A Million Experts", paper="He 2024", arxiv="2407.04153", family="token-choice")
def peer(experts: Experts, *, heads: int = 8, top_k: int = 16, query_width: int = 64) -> MoE:
    """Several queries per token, each retrieving its best of very many tiny experts by product keys.

    Experts are best of hidden size 1. `top_k` counts per head. The paper's batch norm of queries is left out: it
    makes a token depend on the others of the batch.
    """
    return MoE(ProductKeys(experts.width, experts.num_experts, heads, top_k, query_width), experts)
