"""Parameters and floating-point operations of a language model, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from moestro.layers import MoE
    from moestro.models.decoder import Block, DecoderLM


@dataclass(frozen=True)
class ModelCounts:
    """Parameters of a model.

    Attributes:
        total: all of them; equals the sum of `numel` over `model.parameters()`.
        active: those that one token uses: all but the experts it does not visit and what only losses use.
        embedding: input and output embeddings (once when tied); part of both numbers above.
        components: total by component: embedding, attention, norm, router, experts, shared, loss, dense.
        active_components: active by component.
    """

    total: int
    active: int
    embedding: int
    components: dict[str, int] = field(default_factory=dict)
    active_components: dict[str, int] = field(default_factory=dict)


def count_parameters(model: DecoderLM) -> ModelCounts:
    """Count the parameters of `model`, exactly."""
    tied = model.head.weight is model.embedding.weight
    head = 0 if tied else model.head.weight.numel()
    embedding = model.embedding.weight.numel() + head + (0 if model.head.bias is None else model.head.bias.numel())
    components, active = {"embedding": embedding}, {"embedding": embedding}
    _add(components, {"norm": _numel(model.norm)})
    _add(active, {"norm": _numel(model.norm)})
    for block in model.blocks:
        found = _block_components(block)
        _add(components, found)
        _add(active, found | _active_experts(block))
    return ModelCounts(sum(components.values()), sum(active.values()), embedding, components, active)


def _block_components(block: Block) -> dict[str, int]:
    components = {
        "attention": _numel(block.attention),
        "norm": sum(map(_numel, block.norms)),
    }
    if block.ffn is not None:
        return components | {"dense": _numel(block.ffn)}
    assert block.moe is not None
    counts, experts = block.moe.parameter_counts(), _numel(block.moe.experts)
    loss = counts.total - counts.router - counts.shared - experts
    return components | {"router": counts.router, "experts": experts, "shared": counts.shared, "loss": loss}


def _active_experts(block: Block) -> dict[str, int]:
    if block.moe is None:
        return {}
    counts = block.moe.parameter_counts()
    return {"experts": counts.active - counts.router - counts.shared, "loss": 0}


def _add(totals: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        if count:
            totals[name] = totals.get(name, 0) + count


def count_flops_per_token(model: DecoderLM, length: int) -> int:
    """FLOPs of one forward pass in evaluation, per token of a sequence of `length` tokens.

    The convention of `torch.utils.flop_counter`: a multiplication and an addition are two, matrix products alone
    count, and attention counts every pair of positions although half of them are masked. (On CPU that counter
    does not know the fused attention and grouped matmul; with `SDPBackend.MATH` and kernel="loop" it sees all.)
    Routers count one product per matrix and experts `top_k` times: an estimate for methods whose number of experts
    varies by token or whose routers compute more (ReLU and top-p routing, hypernetworks, two-level gates).
    """
    flops = 2 * model.head.weight.numel()
    for block in model.blocks:
        flops += 2 * _matrices(block.attention) + block.attention.flops_per_pair * length
        flops += 2 * (_matrices(block.ffn) if block.ffn is not None else _moe_matrices(block.moe))
    return flops


def _moe_matrices(moe: MoE | None) -> int:
    assert moe is not None
    router = sum(_matrices(part) for name, part in moe.router.named_children() if name != "noise")
    experts = moe.top_k * _matrices(moe.experts) / moe.experts.num_experts
    return router + round(experts) + (0 if moe.shared is None else _matrices(moe.shared))


def _matrices(module: nn.Module) -> int:
    """Entries of matrices; norms and biases are vectors, also when stacked by expert."""
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() >= 2 and not name.endswith("bias"))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
