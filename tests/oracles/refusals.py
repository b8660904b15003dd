"""What two ranks are told when something does not fit, and what a narrow wire and sharded dense weights give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import moestro
from moestro.experts import GLU, MLP, ModuleExperts
from moestro.experts.parallel import ParallelExperts, parallel_banks
from moestro.layers import Gradients, spread
from moestro.parallel import Mesh, MeshShape, Placement
from moestro.parallel.restore import Restore
from moestro.parallel.transports import Adaptive, Chunked, DropCopies, Pairwise, StaticCapacity

SIZES = {"width": 8, "hidden": 6}


def tell(rank: int, _: Any) -> dict[str, Any]:
    """The messages by name, and how far off the two others are."""
    mesh = Mesh(MeshShape(expert=2))
    uneven = Mesh(MeshShape(expert=2), ranks_per_node=1)
    sliced = Mesh(MeshShape(tensor=2))
    cases: dict[str, Callable[[], Any]] = {
        "world": lambda: Mesh(MeshShape(data=3)),
        "indivisible": lambda: spread(moestro.build("qwen3", num_experts=5, top_k=2, **SIZES), mesh),
        "merging": lambda: _merge(mesh),
        "no layer": lambda: spread(nn.Linear(2, 2), mesh),
        "twice": lambda: _twice(mesh),
        "unknown": lambda: ParallelExperts(MLP(2, 8, 6), mesh, transport="teleport"),
        "nothing to drop": lambda: ParallelExperts(MLP(2, 8, 6), mesh, transport="drop-copies"),
        "tokens inside": lambda: DropCopies("gather"),
        "not stacked": lambda: ParallelExperts(
            ModuleExperts([nn.Linear(8, 8)], 8), uneven, transport="data-centric"
        ),
        "groups": lambda: ParallelExperts(MLP(2, 8, 6), mesh, transport=Pairwise(3)),
        "degree": lambda: ParallelExperts(MLP(2, 8, 6), sliced, transport=Adaptive(degree=3)),
        "slices of tokens": lambda: Adaptive("gather"),
        "rows of slices": lambda: ParallelExperts(MLP(2, 8, 6), sliced, transport=Chunked(2, Restore(rows=None))),
        "capacity": lambda: _overflow(mesh),
        "bias": lambda: GLU(2, 8, 6, bias=True).slice(0, 2),
        "hidden": lambda: MLP(2, 8, 5).slice(0, 2),
        "no slices": lambda: spread(moestro.build("moe-plus-plus", num_experts=4, **SIZES), sliced),
        "other ranks": lambda: ParallelExperts(MLP(2, 8, 6), mesh, Placement.contiguous(6, 3)),
        "other number": lambda: ParallelExperts(MLP(3, 8, 6), mesh, Placement.contiguous(4, 2)),
    }
    told = {name: _message(run) for name, run in cases.items()}
    return {**told, "narrow": _narrow(mesh, rank), "sharded": _sharded(rank)}


def _message(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _merge(mesh: Mesh) -> None:
    moe = moestro.build("smear", num_experts=4, **SIZES)
    spread(moe, mesh)
    moe(torch.randn(1, 3, 8))


def _twice(mesh: Mesh) -> None:
    moe = moestro.build("qwen3", num_experts=4, top_k=2, **SIZES)
    spread(moe, mesh)
    spread(moe, mesh)


def _overflow(mesh: Mesh) -> None:
    experts = ParallelExperts(MLP(2, 8, 6), mesh, transport=StaticCapacity(2))
    experts(torch.randn(3, 8), torch.tensor([0, 0, 3, 3, 3]))


def _layer() -> nn.Module:
    torch.manual_seed(0)
    return moestro.build("qwen3", num_experts=4, top_k=2, **SIZES)


def _inputs() -> list[Tensor]:
    return [torch.randn(5, 8, generator=torch.Generator().manual_seed(r)) for r in range(2)]


def _narrow(mesh: Mesh, rank: int) -> float:
    """How far a layer is off that sends bfloat16: a little, not nothing."""
    wide, narrow = _layer(), _layer()
    spread(wide, mesh)
    spread(narrow, mesh, wire_dtype=torch.bfloat16)
    x = _inputs()[rank]
    return float((wide(x) - narrow(x)).detach().abs().max())


def _sharded(rank: int) -> float:
    """The largest difference of norm and gradients, with everything but the experts sharded by FSDP2."""

    def objective(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean()

    whole = nn.Sequential(nn.Linear(8, 8), _layer(), nn.Linear(8, 8)).double()
    torch.nn.init.constant_(whole[0].bias, 0.1)
    torch.nn.init.normal_(whole[0].weight, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(8, 8), _layer(), nn.Linear(8, 8)).double()
    net.load_state_dict(whole.state_dict())
    mesh = Mesh(MeshShape(expert=2))
    spread(net, mesh)
    experts = {p for _, bank in parallel_banks(net) for p in bank.parameters()}
    fully_shard(net, mesh=mesh.tokens["dense"], ignored_params=experts)
    inputs = [x.double() for x in _inputs()]
    objective(net, inputs[rank]).backward()
    (sum(objective(whole, x) for x in inputs) / 2).backward()
    gradients = Gradients(net, mesh)
    gradients.reduce()
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    worst = float((gradients.clip(0.1) - norm).abs())
    torch.nn.utils.clip_grads_with_norm_(whole.parameters(), 0.1, norm)
    for name, p in whole.named_parameters():
        if name.startswith("1.experts"):
            own = net.get_parameter(name.replace("experts.", "experts.local.")).grad
            wanted = p.grad.chunk(2)[rank]
        else:
            own, wanted = net.get_parameter(name).grad.full_tensor(), p.grad
        worst = max(worst, float((own - wanted).abs().max()))
    return worst
