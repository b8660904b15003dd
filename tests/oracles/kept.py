"""How many bytes one pipelined layer keeps alive between its passes, and what its backward pass sends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moestro.experts import MLP
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Mesh, MeshShape, Network
from moestro.parallel.restore import Files, Restore, keep, strategies
from moestro.parallel.transports import Chunked
from moestro.routing import SparseRouting

WIDTH, HIDDEN, TOKENS, EXPERTS = 6, 40, 64, 4


class Live(TorchDispatchMode):
    """Bytes of numbers that were made inside and are still held by anything; and the most there ever were."""

    def __init__(self, stay: Iterable[Tensor]) -> None:
        super().__init__()
        self.left_out = {each.untyped_storage()._cdata for each in stay}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.is_floating_point():
                storage = each.untyped_storage()
                if func is torch.ops.aten.from_file.default:
                    self.left_out.add(storage._cdata)  # on disk
                if storage._cdata not in self.left_out:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        return sum(size for _, size in self.made.values())


def measure(rank: int, given: dict[str, Any]) -> list[dict[str, Any]]:
    """For each number of chunks and strategy: bytes kept, at most, and sent; the largest gradient difference."""
    mesh = Mesh(MeshShape(expert=2), ranks_per_node=1)
    return [_all_strategies(mesh, chunks, given["folder"]) for chunks in given["chunks"]]


def _all_strategies(mesh: Mesh, chunks: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(mesh.rank)
    x, found, first = torch.randn(TOKENS, WIDTH, dtype=torch.float64), {}, list[Tensor]()
    files = Files(folder)
    for name, restore in (strategies(files) | {"kept rows": Restore(keep, None)}).items():
        answer, gradients = _one(mesh, Chunked(chunks, restore), x)
        first = first or gradients
        apart = max(float((a - b).abs().max()) for a, b in zip(gradients, first, strict=True))
        found[name] = {**answer, "apart": apart}
    return found | {"litter": [path.name for path in Path(folder).iterdir()]}


def _one(mesh: Mesh, transport: Chunked, x: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    torch.manual_seed(7)
    network = Network(mesh)
    bank = MLP(EXPERTS // 2, WIDTH, HIDDEN, kernel="loop").double()
    layer = ParallelExperts(bank, mesh, transport=transport, network=network)
    index = torch.arange(TOKENS).unsqueeze(1) % EXPERTS
    routing = SparseRouting.from_choice(index, torch.ones(index.shape, dtype=torch.float64), EXPERTS)
    x = x.clone().requires_grad_()
    with Live(bank.parameters()) as live:
        rows = routing.dispatch(x).detach().requires_grad_()
        before = live.bytes()
        y = layer(rows, routing.offsets)
        kept, most = live.bytes() - before - y.untyped_storage().nbytes(), live.peak
    y.square().sum().backward()
    sent: Callable[[str, str], int] = lambda name, phase: network.traffic.bytes(name, phase, "inter")  # type: ignore[arg-type]  # noqa: E731
    bytes_sent = {
        f"{name} {phase}": sent(name, phase)
        for name in ("dispatch", "combine")
        for phase in ("forward", "recompute", "backward")
    }
    assert rows.grad is not None
    gradients = [rows.grad, *(p.grad for p in bank.parameters() if p.grad is not None)]
    return {"kept": kept, "most": most, "sent": bytes_sent}, gradients


def checkpointed(rank: int, names: list[str]) -> list[dict[str, Any]]:
    """Of an activation-checkpointed layer in parts, for each strategy: calls of its experts, bytes, gradients."""
    mesh, found = Mesh(MeshShape(expert=2), ranks_per_node=1), []
    with TemporaryDirectory() as folder:
        for name in names:
            transport = Chunked(4, strategies(Files(folder))[name])
            plain, again = (_counted(mesh, transport, way) for way in (lambda run, x: run(x), _again))
            both = zip(plain.pop("gradients"), again.pop("gradients"), strict=True)
            apart = max(float((a - b).abs().max()) for a, b in both)
            found.append(
                {**again, "apart": apart, "once": plain["calls"], "copied": _moved_elsewhere(mesh, transport)}
            )
    return found


def _again(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(run, x, use_reentrant=False)


def _counted(mesh: Mesh, transport: Chunked, way: Callable[..., Tensor]) -> dict[str, Any]:
    torch.manual_seed(7)
    network, bank = Network(mesh), MLP(EXPERTS // 2, WIDTH, HIDDEN, kernel="loop").double()
    layer = ParallelExperts(bank, mesh, transport=transport, network=network)
    calls = [0, 0]  # forward, backward
    bank.register_forward_hook(lambda *_: calls.__setitem__(phase, calls[phase] + 1))
    index = torch.arange(TOKENS).unsqueeze(1) % EXPERTS
    routing = SparseRouting.from_choice(index, torch.ones(index.shape, dtype=torch.float64), EXPERTS)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    phase = 0
    with Live(bank.parameters()) as live:
        before = live.bytes()
        y = way(lambda x: layer.run(x, routing), x)
        kept = live.bytes() - before - y.untyped_storage().nbytes()
    phase = 1
    y.square().sum().backward()
    sent = {p: network.traffic.bytes("dispatch", p, "inter") for p in ("forward", "recompute", "backward")}  # type: ignore[arg-type]
    gradients = [each.grad for each in (x, *bank.parameters())]
    return {"calls": calls, "kept": kept, "sent": sent, "gradients": gradients}


def _moved_elsewhere(mesh: Mesh, transport: Chunked) -> str:
    """What is said where hooks of others copy what is saved."""
    layer = ParallelExperts(MLP(EXPERTS // 2, WIDTH, HIDDEN).double(), mesh, transport=transport)
    index = torch.arange(TOKENS).unsqueeze(1) % EXPERTS
    routing = SparseRouting.from_choice(index, torch.ones(index.shape, dtype=torch.float64), EXPERTS)
    with saved_tensors_hooks(Tensor.clone, lambda saved: saved):
        y = layer.run(torch.randn(TOKENS, WIDTH, dtype=torch.float64), routing)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""
