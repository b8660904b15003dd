"""The experts that one token chose, run without sorting pairs by expert: what decoding does in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.experts.base import Experts
from moestro.experts.few import few_rows, takes_few
from moestro.experts.glu import GLU
from moestro.experts.mlp import MLP
from moestro.experts.quantised import QuantisedExperts
from moestro.routing import SparseRouting


def run_chosen(experts: Experts, row: Tensor, index: Sequence[int], weight: Tensor) -> Tensor:
    """`y = sum_i weight[i] f_index[i](row)`, for one token where no gradient is asked for.

    Args:
        experts: any bank; quantised ones, and float32 or bfloat16 stacks, have a short way.
        row: the token, in the dtype of the experts; bfloat16 for quantised ones.
        index: its experts, in any order.
        weight: of each, float32.

    Shapes: row `[1, width]`, weight `[1, chosen]` -> `[1, out_width]`; float32 by the short ways.
    """
    if type(experts) is QuantisedExperts and row.dtype == torch.bfloat16:
        return torch.mm(weight, experts.answers(row, index).float())
    chosen = torch.tensor(index, dtype=torch.long)
    if type(experts) in (GLU, MLP) and takes_few(experts, row, len(index)):
        return torch.mm(weight, few_rows(experts, row.expand(len(index), -1), chosen).float())
    return experts.run(row, SparseRouting.from_choice(chosen.unsqueeze(0), weight, experts.num_experts))
