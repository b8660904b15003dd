"""A few steps of a decoder whose dense part is sharded, and of the same decoder in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import moestro
from moestro.layers import Gradients, spread
from moestro.layers.sharding import shard_dense, sharded_groups
from moestro.parallel import Mesh, MeshShape

STEPS, ROWS, LENGTH = 3, 4, 8


def trained(rank: int, meshes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """For each mesh the largest differences of losses, norms and weights, and the share of the dense part here."""
    return [_compared(rank, Mesh(MeshShape(**sizes))) for sizes in meshes]


def _compared(rank: int, mesh: Mesh) -> dict[str, Any]:
    alone, model = _model(), _model()
    reference = _steps(alone, torch.optim.AdamW(alone.parameters(), lr=0.01), None, slice(None))
    dense = sum(p.numel() for name, p in model.named_parameters() if "experts" not in name)
    spread(model, mesh)
    shard_dense(model, mesh, model.blocks)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    groups = [{"params": each} for each in sharded_groups(model.parameters())]
    optimiser = torch.optim.AdamW(groups, lr=0.01, fused=True)
    share = slice(rank * ROWS // mesh.shape.dense, (rank + 1) * ROWS // mesh.shape.dense)
    measured = _steps(model, optimiser, Gradients(model, mesh), share, mesh)
    whole = dict(alone.named_parameters())
    kept = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return {
        "numbers": max(abs(a - b) for a, b in zip(reference, measured, strict=True)),
        "weights": max(float((p.full_tensor() - whole[name]).detach().abs().max()) for name, p in kept.items()),
        "share": sum(p.to_local().numel() for p in sharded) / dense,
        "state": sum(optimiser.state[p]["exp_avg"].to_local().numel() for p in sharded) / dense,
    }


def _model() -> nn.Module:
    return moestro.build_language_model(
        vocab_size=16,
        width=8,
        num_layers=2,
        num_heads=2,
        method="mixtral",
        options={"top_k": 2},
        num_experts=4,
        expert_hidden=8,
        seed=0,
    ).double()


def _steps(model: nn.Module, optimiser: Any, gradients: Any, rows: slice, mesh: Mesh | None = None) -> list[float]:
    found = []
    for step in range(STEPS):
        tokens = torch.randint(16, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))[rows]
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        if gradients is None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        else:
            gradients.reduce()
            norm = gradients.clip(0.5)
            loss = loss.detach()
            torch.distributed.all_reduce(loss, group=mesh.dense)
            loss /= mesh.shape.dense
        optimiser.step()
        found += [float(loss.detach()), float(norm.detach())]
    return found
