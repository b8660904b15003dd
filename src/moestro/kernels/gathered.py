"""The product for a handful of rows: every row with the matrix of its own expert, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_PAIRS = 32
_DTYPES = (torch.float32, torch.bfloat16)


def suits_few(rows: Tensor, weight: Tensor, pairs: int) -> bool:
    """Whether `gathered_product` takes these tensors and wins: few pairs on a CPU, and no gradient asked for."""
    return (
        not torch.compiler.is_compiling()  # asked first: a compiled graph serves every number of pairs
        and pairs <= FEW_PAIRS
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype
        and rows.dtype in _DTYPES
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    )


def gathered_rows(expert: Tensor, inputs: int) -> Tensor:
    """Which rows of stacked weights `[experts * in, out]` each expert owns, `[pairs, in]` int64."""
    return torch.add(torch.arange(inputs, device=expert.device), expert.unsqueeze(1), alpha=inputs)


def gathered_product(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Multiply each row by the matrix of its expert.

        y[p] = sum_i rows[p, i] * weight[expert[p], i]

    which is a bag of weighted embeddings: the rows of `weight` are read in place and in order, spread over the
    threads by pair. One token of 8 experts (1024 x 512, gated, bfloat16, 2 threads): 0.86 ms, and 0.90 for a
    dense matrix of the same bytes (`benchmarks/model.py`). An expert of several pairs is read for each.

    Shapes: rows `[pairs, in]`, index `[pairs, in]` from `gathered_rows`, weight `[experts, in, out]` ->
    `[pairs, out]`.
    """
    starts = torch.arange(0, index.numel(), index.shape[1], device=rows.device)
    table, shares = weight.flatten(0, 1), rows.reshape(-1)
    return torch.embedding_bag(table, index.view(-1), starts, False, 0, False, shares)[0]
