"""A few steps of a decoder whose dense part is sharded, and of the same decoder in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import moestro
from moestro.balance import RoutingLog
from moestro.data import Batch
from moestro.layers import Gradients, MoE, spread
from moestro.layers.sharding import shard_dense, sharded_groups
from moestro.parallel import Mesh, MeshShape
from moestro.train.build import build_model
from moestro.train.machine import choose_machine
from moestro.train.optimiser import build_optimiser
from moestro.train.part import take_part
from moestro.train.recipe import ModelSection, ParallelSection
from moestro.train.step import Stepper
from moestro.train.team import Team

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


def every(rank: int, methods: list[str]) -> dict[str, float]:
    """For each method how far a decoder whose dense part is shared out is from one that is spread only.

    Of one process it would be another curve where routing draws noise, or looks at more than one token.
    """
    mesh, team = Mesh(MeshShape(expert=2)), Team(rank, 2, rank, 2)
    found = {}
    for name in methods:
        whole = _numbers(name, team, mesh, ParallelSection())
        shared = _numbers(name, team, mesh, ParallelSection(shard_dense=True))
        found[name] = max(abs(a - b) for a, b in zip(whole, shared, strict=True))
    return found


def learners() -> list[str]:
    """Methods of which a decoder can be made and spread."""
    return [name for name, each in moestro.all_methods().items() if each.family != "merging" and _is_made(name)]


def _is_made(method: str) -> bool:
    try:
        layers = [layer for layer in _model_of(method).modules() if isinstance(layer, MoE)]
    except ValueError:
        return False
    return all(layer.experts.num_experts % 2 == 0 for layer in layers)


def _model_of(method: str) -> nn.Module:
    sizes = {"num_experts": 8, "expert_hidden": 8, "width": 8, "num_layers": 2, "num_heads": 2, "kernel": "loop"}
    options = {"top_k": 2} if "top_k" in moestro.all_methods()[method].options else {}
    section = ModelSection(method=method, options=options, **sizes)
    return build_model(section, vocab_size=16, sequence_length=LENGTH, seed=0, num_domains=2)


def _numbers(method: str, team: Team, mesh: Mesh | None, settings: ParallelSection) -> list[float]:
    """Losses and gradient norms of three steps."""
    model = _model_of(method).double()
    part = take_part(model, team, mesh, settings)
    optimiser = build_optimiser(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95), kept=part.keeps)
    stepper = Stepper(
        model, optimiser, choose_machine("cpu", "float64", 1), RoutingLog(model), exchange=part.exchange
    )
    numbers = []
    for step in range(STEPS):
        torch.manual_seed(step)
        tokens = torch.randint(16, (ROWS, LENGTH + 1)).chunk(team.size)[team.rank]
        domain = torch.zeros(len(tokens), LENGTH, dtype=torch.uint8)
        result = stepper(Batch(tokens[:, :-1], tokens[:, 1:], domain, domain.numel()), step + 1)
        numbers += [result.loss, result.grad_norm, result.auxiliary_loss]
    return numbers


def together(rank: int, _: None) -> dict[str, Any]:
    """What of a shared out decoder is whole while each block computes, after the forward and the backward pass."""
    mesh, model = Mesh(MeshShape(data=2)), _model()
    model.register_parameter("temperature", nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    spread(model, mesh)
    blocks = list(model.blocks)
    shard_dense(model, mesh, blocks)
    seen: list[list[int]] = []

    def whole(block: nn.Module) -> bool:
        dense = [p for name, p in block.named_parameters() if "experts" not in name]
        return not any(isinstance(p, DTensor) for p in dense)

    for block in blocks:
        inside = next(block.children())
        inside.register_forward_hook(lambda *_: seen.append([n for n, each in enumerate(blocks) if whole(each)]))
    logits = model(torch.randint(16, (2, LENGTH)))
    between = _not_shared(model)
    logits.sum().backward()
    return {"whole": seen, "between": between, "after": _not_shared(model)}


def _not_shared(model: nn.Module) -> list[str]:
    """What of the dense part is whole here."""
    dense = [(name, p) for name, p in model.named_parameters() if "experts" not in name]
    return [name for name, p in dense if not isinstance(p, DTensor)]
