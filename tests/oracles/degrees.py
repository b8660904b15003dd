"""What one layer sends with every degree of the adaptive transport, and what it returns when the degree changes."""

from __future__ import annotations

from typing import Any

import torch

from moestro.experts import MLP
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Mesh, MeshShape, Network
from moestro.parallel.transports import Adaptive
from moestro.routing import SparseRouting

WIDTH, TOKENS, TOP_K, EXPERTS = 6, 8, 2, 4


def sent(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes to other ranks by name and phase, of each case: sizes of a mesh, hidden size and degree."""
    meshes: dict[tuple[int, int], Mesh] = {}
    found = []
    for case in cases:
        sizes = (case["expert"], case["tensor"])
        if sizes not in meshes:
            meshes[sizes] = Mesh(MeshShape(expert=sizes[0], tensor=sizes[1]), ranks_per_node=2)
        layer, adaptive, network = _layer(meshes[sizes], case["hidden"], case["degree"])
        x = torch.randn(TOKENS, WIDTH, requires_grad=True)
        layer.run(x, _even()).square().sum().backward()
        counter: dict[str, int] = {}
        for (name, phase, link), number in network.traffic.sent.items():
            if link != "self":
                counter[f"{name} {phase}"] = counter.get(f"{name} {phase}", 0) + number
        found.append({"bytes": counter, "taken": list(adaptive.taken)})
    return found


def switched(rank: int, degrees: list[int]) -> dict[str, Any]:
    """One layer that takes one degree after another: how far apart outputs are, and whether weights changed."""
    layer, adaptive, _ = _layer(Mesh(MeshShape(tensor=4)), 8, degrees[0])
    layer.double()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    before = [p.clone() for p in layer.parameters()]
    outputs = []
    for degree in degrees:
        adaptive.degree = degree
        outputs.append(layer.run(x, _even(torch.float64)).detach())
    apart = max(float((y - outputs[0]).abs().max()) for y in outputs)
    same = all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    return {"apart": apart, "same": same, "taken": dict(adaptive.taken), "size": float(outputs[0].abs().max())}


def _layer(mesh: Mesh, hidden: int, degree: int | None) -> tuple[ParallelExperts, Adaptive, Network]:
    torch.manual_seed(0)
    bank = MLP(EXPERTS, WIDTH, hidden)
    slots = EXPERTS // mesh.shape.expert
    first = mesh.experts.get_local_rank("expert") * slots
    local = bank.share(range(first, first + slots)).slice(mesh.experts.get_local_rank("tensor"), mesh.shape.tensor)
    network, adaptive = Network(mesh), Adaptive(degree=degree)
    return ParallelExperts(local, mesh, transport=adaptive, network=network), adaptive, network


def _even(dtype: torch.dtype = torch.float32) -> SparseRouting:
    index = torch.tensor([[(2 * t) % EXPERTS, (2 * t + 1) % EXPERTS] for t in range(TOKENS)])
    return SparseRouting.from_choice(index, torch.full(index.shape, 0.5, dtype=dtype), EXPERTS)
