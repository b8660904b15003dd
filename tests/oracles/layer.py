"""A slow MoE layer: carries out a decision one token and one expert at a time."""

import torch
from torch import Tensor, nn

from moestro.layers import MoE
from moestro.routing import Decision, MergeRouting, SoftRouting, SparseRouting


def run_layer(moe: MoE, x: Tensor, decision: Decision) -> Tensor:
    """What `moe.run(x, decision)` must give, from the fields of the routing alone."""
    routing = decision.routing
    if isinstance(routing, SparseRouting):
        y = _sparse(getattr(moe.experts, "inner", moe.experts), x, routing)
        y = y + _generated(moe.experts, x, routing) if hasattr(moe.experts, "network") else y
    elif isinstance(routing, SoftRouting):
        y = _soft(moe.experts, x, routing)
    else:
        y = _merge(moe.experts, x, routing)
    if moe.shared is not None:
        amount = decision.notes.get("shared_weight", torch.ones(len(x)))
        amount = amount * decision.notes.get("valid", torch.ones(len(x), dtype=torch.bool))
        y = torch.stack([y[t] + moe.shared(x[t]) * amount[t].to(x.dtype) for t in range(len(x))]) if len(x) else y
    return y


def one_expert(experts: nn.Module, e: int, row: Tensor) -> Tensor:
    """One row through one expert, written out from its stacked weights."""
    for bank in getattr(experts, "banks", ()):
        if e < bank.num_experts:
            return one_expert(bank, e, row)
        e -= bank.num_experts
    if not hasattr(experts, "activation"):
        return trivial(experts, e, row)
    p = {name: value[e] for name, value in experts.named_parameters()}
    return formula(p, row, experts.activation)


def trivial(experts: nn.Module, e: int, row: Tensor) -> Tensor:
    """Zero, copy and constant experts."""
    kind = type(experts).__name__
    if kind == "ConstantExperts":
        a, b = row @ experts.weight[e, :, 0], row @ experts.weight[e, :, 1]
        share = 1 / (1 + torch.exp(b - a))
        return share * row + (1 - share) * experts.vector[e]
    return {"ZeroExperts": row * 0, "CopyExperts": row}[kind]


def formula(p: dict[str, Tensor], row: Tensor, activation: str) -> Tensor:
    up = row @ p["up"] + p.get("up_bias", 0)
    if "gate" in p:
        gate = row @ p["gate"] + p.get("gate_bias", 0)
        act = gate / (1 + torch.exp(-gate)) if activation == "swiglu" else _gelu(gate)
        hidden = act * up
    else:
        hidden = {
            "relu": lambda z: z.clamp(min=0),
            "gelu": _gelu,
            "silu": lambda z: z / (1 + torch.exp(-z)),
            "squared_relu": lambda z: z.clamp(min=0) ** 2,
        }[activation](up)
    return hidden @ p["down"] + p.get("down_bias", 0)


def _gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / 2**0.5))


def _sparse(experts: nn.Module, x: Tensor, routing: SparseRouting) -> Tensor:
    rows: list[Tensor] = [x[t] * 0 for t in range(routing.num_tokens)]
    bounds = routing.offsets.tolist()
    for e in range(len(bounds) - 1):
        for pair in range(bounds[e], bounds[e + 1]):
            t, w = int(routing.token[pair]), routing.weight[pair].to(x.dtype)
            if routing.scale == "input":
                rows[t] = rows[t] + one_expert(experts, e, x[t] * w)
            else:
                rows[t] = rows[t] + one_expert(experts, e, x[t]) * w
    return torch.stack(rows) if rows else x * 0


def _soft(experts: nn.Module, x: Tensor, routing: SoftRouting) -> Tensor:
    rows: list[Tensor] = [x[t] * 0 for t in range(routing.num_tokens)]
    groups, num_experts, slots, length = routing.dispatch_weight.shape
    for g in range(groups):
        for e in range(num_experts):
            for s in range(slots):
                row = x[0] * 0
                for place in range(length):
                    row = row + routing.dispatch_weight[g, e, s, place] * x[routing.token[g, place]]
                out = one_expert(experts, e, row)
                for place in range(length):
                    t = int(routing.token[g, place])
                    rows[t] = rows[t] + routing.combine_weight[g, place, e, s] * out
    return torch.stack(rows) if rows else x * 0


def _merge(experts: nn.Module, x: Tensor, routing: MergeRouting) -> Tensor:
    rows: list[Tensor] = [x[t] * 0 for t in range(routing.num_tokens)]
    bounds = routing.rows.offsets.tolist()
    for v in range(len(bounds) - 1):
        mixed = {
            name: sum(routing.mixture[v, e] * p[e] for e in range(routing.num_experts))
            for name, p in experts.named_parameters()
        }
        for pair in range(bounds[v], bounds[v + 1]):
            t = int(routing.rows.token[pair])
            rows[t] = rows[t] + formula(mixed, x[t], experts.activation) * routing.rows.weight[pair]
    return torch.stack(rows) if rows else x * 0


def _generated(experts: nn.Module, x: Tensor, routing: SparseRouting) -> Tensor:
    """Adapters made from the experts that each token did not choose."""
    rows, chosen = [], routing.expert.tolist()
    for t in range(len(x)):
        mine = {e for e, source in zip(chosen, routing.token.tolist(), strict=True) if source == t}
        q = sum((experts.embedding[e] for e in range(experts.num_experts) if e not in mine), experts.layer * 0)
        network = experts.network
        c = (q @ network.first).relu() @ network.second
        h = (torch.cat([c, experts.layer]) @ network.mix).relu()
        down, down_bias, up, up_bias = (sum(h[i] * head[i] for i in range(len(h))) for head in network.heads)
        rows.append(((x[t] @ down + down_bias).relu() @ up + up_bias) * bool(mine))
    return torch.stack(rows) if rows else x * 0
