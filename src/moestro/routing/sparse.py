"""The ordinary routing: (token, expert) pairs sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SparseRouting:
    """Which tokens go to which experts, and with which weight their results come back.

        y = C F(D x)        D picks `token`, C is its transpose times `weight`

    Build it with `from_choice` (tokens choose), `from_experts` (experts choose) or `from_matrix` (anything).

    Attributes:
        token: source token of each pair, `[pairs]` int64; grouped by expert, in token order within one.
        weight: combine weight of each pair, `[pairs]` float, differentiable.
        offsets: pairs of expert e are `offsets[e]:offsets[e + 1]`, `[experts + 1]` int64.
        num_tokens: tokens of the call.
        scale: whether the weight multiplies the expert's output (usual) or its input.
        slot: row of each token's choices, `[tokens, k]` int64, `pairs` where dropped; None if k varies.
    """

    token: Tensor
    weight: Tensor
    offsets: Tensor
    num_tokens: int
    scale: Literal["output", "input"] = "output"
    slot: Tensor | None = None

    @classmethod
    def from_choice(
        cls,
        index: Tensor,
        weight: Tensor,
        num_experts: int,
        keep: Tensor | None = None,
        scale: Literal["output", "input"] = "output",
    ) -> SparseRouting:
        """Routing from what each token chose, by one stable sort.

        While `torch.export` traces, dropped choices stay behind the last group, since how many there are is data.

        Shapes: index, weight and keep (bool; None = all) `[tokens, k]`.
        """
        num_tokens, k = index.shape
        expert = index.flatten() if keep is None else index.masked_fill(~keep, num_experts).flatten()
        order = expert.argsort(stable=True)  # [tokens * k], dropped choices last
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device)
        offsets = offsets_from(expert, num_experts)
        if keep is not None and not torch.compiler.is_exporting():  # an exported graph keeps its shapes
            pairs = int(offsets[-1])
            order, slot = order[:pairs], slot.clamp(max=pairs)
        weight = weight.flatten().index_select(0, order)
        token = order.div(max(k, 1), rounding_mode="floor")
        return cls(token, weight, offsets, num_tokens, scale, slot.view(num_tokens, k))

    @classmethod
    def from_experts(cls, token: Tensor, weight: Tensor, num_tokens: int) -> SparseRouting:
        """Routing from what each expert chose.

        Shapes: token int64 and weight `[experts, capacity]`.
        """
        num_experts, capacity = token.shape
        token, order = token.sort(dim=1, stable=True)
        weight = weight.gather(1, order)
        offsets = torch.arange(num_experts + 1, device=token.device) * capacity
        return cls(token.flatten(), weight.flatten(), offsets, num_tokens)

    @classmethod
    def from_matrix(cls, weight: Tensor, keep: Tensor) -> SparseRouting:
        """Routing from a whole matrix, for any number of experts per token and tokens per expert.

        Shapes: weight and keep (bool) `[tokens, experts]`.
        """
        if torch.compiler.is_exporting():
            index = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
            return cls.from_choice(index, weight, keep.shape[1], keep)
        expert, token = keep.t().nonzero(as_tuple=True)
        return cls(token, weight[token, expert], offsets_from(expert, keep.shape[1]), len(keep))

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.offsets) - 1

    @property
    def expert(self) -> Tensor:
        """Expert of each pair, `[pairs]` int64."""
        experts = torch.arange(self.num_experts, device=self.offsets.device)
        return experts.repeat_interleave(self.load(), output_size=len(self.token))

    def dispatch(self, x: Tensor) -> Tensor:
        """Rows for the experts: `x [tokens, width]` -> `[pairs, width]`, grouped by expert."""
        rows = _Gather.apply(x, self.token, self.slot)
        return rows if self.scale == "output" else rows * self.weight.unsqueeze(1).to(rows.dtype)

    def combine(self, rows: Tensor) -> Tensor:
        """Weighted sum per token: `rows [pairs, width]` -> `[tokens, width]`; zero where no expert took it."""
        if self.scale == "output":
            rows = rows * self.weight.unsqueeze(1).to(rows.dtype)
        return _Collect.apply(rows, self.token, self.slot, self.num_tokens)

    def by_token(self) -> tuple[Tensor, Tensor]:
        """The pairs in token order, a token's in the order of its choices, and where each token's begin.

        Shapes: `[pairs]` and `[tokens]`, int64.
        """
        if self.slot is None:
            load = torch.zeros(self.num_tokens, dtype=torch.long, device=self.token.device)
            load.scatter_add_(0, self.token, torch.ones_like(self.token))
            return self.token.argsort(stable=True), load.cumsum(0) - load
        k = self.slot.shape[1]
        if _surely_equal(self.slot.numel(), len(self.token)):
            return self.slot.flatten(), torch.arange(0, len(self.token), max(k, 1), device=self.token.device)
        kept = self.slot < len(self.token)
        load = kept.sum(1)
        return self.slot[kept], load.cumsum(0) - load

    def load(self) -> Tensor:
        """Pairs per expert, `[experts]` int64."""
        return self.offsets.diff()

    def combine_matrix(self) -> Tensor:
        """The whole combine matrix, `[tokens, experts]`; for tests and pictures, not for large runs."""
        matrix = self.weight.new_zeros(self.num_tokens, self.num_experts)
        return matrix.index_put((self.token, self.expert), self.weight, accumulate=True)

    def check(self) -> None:
        """Raise ValueError if an invariant is broken; synchronises, so it is not called on every step."""
        bounds = self.offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(self.token) or sorted(bounds) != bounds:
            raise ValueError(f"offsets must rise from 0 to {len(self.token)} pairs, got {bounds}")
        if len(self.weight) != len(self.token):
            raise ValueError(f"{len(self.token)} pairs need as many weights, got {len(self.weight)}")
        if len(self.token) and not 0 <= int(self.token.min()) <= int(self.token.max()) < self.num_tokens:
            raise ValueError(f"pairs must name tokens 0 to {self.num_tokens - 1}")
        same_expert = self.expert.diff() == 0
        if bool((self.token.diff()[same_expert] <= 0).any()):
            raise ValueError("the pairs of an expert must be in token order, each token once")


def offsets_from(expert: Tensor, num_experts: int) -> Tensor:
    """Where each expert's pairs begin once sorted; indices >= num_experts are left out. `[experts + 1]`."""
    count = torch.zeros(num_experts + 2, dtype=torch.long, device=expert.device)
    count.scatter_add_(0, expert + 1, torch.ones_like(expert))
    return count[: num_experts + 1].cumsum(0)


def _surely_equal(first: int, second: int) -> bool:
    """Whether two sizes are equal, and known to be so where a compiler traces sizes that are data."""
    if not torch.compiler.is_compiling():
        return first == second
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(first == second))


def _gather(x: Tensor, token: Tensor) -> Tensor:
    return x.index_select(0, token)


def _collect(rows: Tensor, token: Tensor, slot: Tensor | None, num_tokens: int) -> Tensor:
    if slot is None:
        return rows.new_zeros(num_tokens, rows.shape[1]).index_add(0, token, rows)
    if not _surely_equal(len(rows), slot.numel()):  # dropped choices read the extra row of zeros
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(slot, rows, mode="sum")  # gather and sum without the copy [tokens, k, width]


class _Gather(torch.autograd.Function):
    """`D x`, whose gradient is `D' g` in a fixed order of summation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slot: Tensor | None) -> Tensor:
        ctx.save_for_backward(token, slot)
        ctx.num_tokens = len(x)
        return _gather(x, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token, slot = ctx.saved_tensors
        return _Collect.apply(grad, token, slot, ctx.num_tokens), None, None


class _Collect(torch.autograd.Function):
    """`D' rows`, whose gradient is `D g`: the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, slot: Tensor | None, num_tokens: int) -> Tensor:
        ctx.save_for_backward(token, slot)
        return _collect(rows, token, slot, num_tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token, slot = ctx.saved_tensors
        return _Gather.apply(grad, token, slot), None, None, None
