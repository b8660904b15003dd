"""Hash Layers."""

from typing import Literal

import torch

from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import HashRouter
from moestro.routers.fixed import by_bigram, by_position, by_previous, by_token
from moestro.routers.tables import balanced_table, dispersed_table, random_table

_KEYS = {"bigram": by_bigram, "previous": by_previous, "position": by_position}


@method(
    title="Hash Layers For Large Sparse Models",
    paper="Roller et al. 2021",
    arxiv="2106.04426",
    family="fixed",
)
def hash_layers(
    experts: Experts,
    *,
    vocab_size: int,
    table: Literal["random", "balanced", "clustered", "dispersed", "bigram", "previous", "position"] = "random",
    seed: int = 42,
    frequencies: list[float] | None = None,
    clusters: list[int] | None = None,
    num_hashes: int = 1,
) -> MoE:
    """The expert of a token is a fixed function of its id: nothing is learned, nothing is balanced.

    Tables: `random`; `balanced` packs ids by their training `frequencies`; `clustered` sends each of the given
    `clusters` to one expert and `dispersed` spreads it over all; `bigram`, `previous` and `position` hash that
    key instead of the id. With `num_hashes` N (MultiHash) the bank holds N segments of experts, each 1/N of the
    hidden size: N times as many experts, of which a token uses one per segment. Needs `Context.token_ids`
    (`Context.position` for `position`).
    """
    if experts.num_experts % num_hashes:
        raise ValueError(f"num_hashes={num_hashes} must divide the bank of {experts.num_experts} experts")
    num_experts = experts.num_experts // num_hashes
    with torch.device("cpu"):  # tables are data, also where the weights are only planned
        if table == "balanced":
            tables = [balanced_table(_given(frequencies, "frequencies", vocab_size), num_experts)] * num_hashes
        elif table == "dispersed":
            tables = [dispersed_table(_given(clusters, "clusters", vocab_size), num_experts)] * num_hashes
        elif table == "clustered":
            tables = [torch.as_tensor(_given(clusters, "clusters", vocab_size))] * num_hashes
        else:
            num_keys = vocab_size + (table == "previous")  # one more key for "no token before"
            tables = [random_table(num_keys, num_experts, seed + n) for n in range(num_hashes)]
    return MoE(HashRouter(torch.stack(tables), num_experts, _KEYS.get(table, by_token)), experts)


def _given(values: list | None, name: str, vocab_size: int) -> list:
    if values is None or len(values) != vocab_size:
        raise ValueError(
            f"this table needs `{name}` with one entry for each of {vocab_size} ids, "
            f"got {'none' if values is None else len(values)}"
        )
    return values
