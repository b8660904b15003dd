"""Retrieval among very many experts: two short searches instead of one long one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.routers.base import Router, check_top_k, context_notes
from moestro.routing import Context, Decision, SparseRouting, top_k


class ProductKeys(Router):
    """Each head finds its best experts among rows x columns, by a score that is a sum of two.

        score(i, j) = q' . c_i + q'' . d_j,   q = [q'; q''] = x W_head;   a = softmax over the k best of a head
        y_t = sum over heads and their experts of a f_e(x_t)        He 2024 (PEER), eqs. 1-4

    The k best of all pairs are among the k best rows times the k best columns, so no `[tokens, experts]` matrix is
    made and the decision has neither logits nor probs. Heads share the keys. An expert that several heads find
    serves once, with the sum of the weights.

    Args:
        width: model width.
        num_experts: best a square; it is split into rows and columns as evenly as divisors allow.
        heads: queries of a token.
        k: experts per head.
        query_width: size of a half query.

    Parameters: query `[heads, 2, query_width, width]`, row `[rows, query_width]`, column `[columns, query_width]`.
    """

    def __init__(self, width: int, num_experts: int, heads: int, k: int, query_width: int) -> None:
        super().__init__()
        if heads < 1 or query_width < 1:
            raise ValueError(f"heads={heads} and query_width={query_width} must be at least 1")
        self.num_experts, self.k = num_experts, check_top_k(k, num_experts)
        self.top_k = min(heads * k, num_experts)
        rows = max(n for n in range(1, int(num_experts**0.5) + 1) if num_experts % n == 0)
        self.query = nn.Parameter(torch.randn(heads, 2, query_width, width) * width**-0.5)
        self.row = nn.Parameter(torch.randn(rows, query_width) * query_width**-0.5)
        self.column = nn.Parameter(torch.randn(num_experts // rows, query_width) * query_width**-0.5)

    def decide(self, x: Tensor, context: Context) -> Decision:
        index, weight = self._retrieve(x)  # [tokens, heads * k]
        same = index.unsqueeze(2) == index.unsqueeze(1)
        weight = (same * weight.unsqueeze(1)).sum(-1)
        first = ~same.tril(-1).any(-1)
        keep = first if context.valid is None else first & context.valid.unsqueeze(1)
        routing = SparseRouting.from_choice(index, weight, self.num_experts, keep)
        notes = {**context_notes(context), "choice": index, "wanted": first, "kept": keep}
        return Decision(routing, notes=notes)

    def _retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = torch.einsum("tw,hpqw->thpq", x, self.query.to(x.dtype))
        rows, columns = query[:, :, 0] @ self.row.t().to(x.dtype), query[:, :, 1] @ self.column.t().to(x.dtype)
        best_row, best_column = top_k(rows, self.k), top_k(columns, self.k)
        pair = rows.gather(2, best_row).unsqueeze(-1) + columns.gather(2, best_column).unsqueeze(-2)
        expert = best_row.unsqueeze(-1) * len(self.column) + best_column.unsqueeze(-2)
        best = top_k(pair.flatten(2), self.k)
        weight = pair.flatten(2).gather(2, best).softmax(-1)
        return expert.flatten(2).gather(2, best).flatten(1), weight.flatten(1)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, heads={len(self.query)}, k={self.k}"
