"""What the layer benchmarks compare with: dense layers of equal FLOPs, and the experts of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.experts import make_experts
from moestro.experts.glu import GLU
from moestro.routing import SparseRouting

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer: `top_k` of `num_experts` gated experts of `hidden`, on rows of `width`."""

    name: str
    width: int
    hidden: int
    num_experts: int
    top_k: int


SHAPES = (
    Shape("OLMoE / 2", 1024, 512, 64, 8),
    Shape("Mixtral / 4", 1024, 3584, 8, 2),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("128 tiny", 250, 77, 128, 8),
)


def routed(shape: Shape, tokens: int) -> tuple[Tensor, Tensor, SparseRouting]:
    """Random choices of different experts, their weights, and the routing made of both."""
    index = torch.rand(tokens, shape.num_experts).topk(shape.top_k).indices
    weight = torch.rand(tokens, shape.top_k).softmax(-1)
    return index, weight, SparseRouting.from_choice(index, weight, shape.num_experts)


def bank(shape: Shape, dtype: torch.dtype, kernel: str = "auto") -> GLU:
    experts = make_experts(shape.num_experts, shape.width, shape.hidden, kernel=kernel).to(dtype)
    assert isinstance(experts, GLU)
    return experts


def dense_layers(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Layer, list[Tensor]]]:
    """Gated dense layers of equal FLOPs, by the way they are written: the fastest of them is the limit."""
    width, hidden = shape.width, shape.hidden * shape.top_k
    gate, up = (torch.randn(width, hidden).mul_(width**-0.5).to(dtype).requires_grad_() for _ in range(2))
    down = torch.randn(hidden, width).mul_(hidden**-0.5).to(dtype).requires_grad_()
    both = torch.cat([gate.detach(), up.detach()], 1).t().contiguous().requires_grad_()
    out = down.detach().t().contiguous().requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return (F.silu(x @ gate) * (x @ up)) @ down

    def joined(x: Tensor) -> Tensor:
        a, b = F.linear(x, both).chunk(2, -1)
        return F.linear(F.silu(a) * b, out)

    one = make_experts(1, width, hidden, kernel="fused").to(dtype)

    def single(x: Tensor) -> Tensor:
        return one(x, torch.tensor([0, len(x)]))

    return {
        "three products": (plain, [gate, up, down]),
        "gate and up joined": (joined, [both, out]),
        "a fused bank of one": (single, list(one.parameters())),
    }


def transformers_experts(shape: Shape, ours: GLU, path: str) -> tuple[Any, list[Tensor]] | None:
    """transformers' experts with our weights, run by one of its back ends (eager, batched_mm, grouped_mm)."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = path
    theirs = Qwen3MoeExperts(config).to(ours.up.dtype)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.cat([ours.gate, ours.up], 2).transpose(1, 2))
        theirs.down_proj.copy_(ours.down.transpose(1, 2))
    return theirs, list(theirs.parameters())
