"""Layers whose transport measures what is fastest, with ways that are slow on purpose; and whole runs with one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from oracles.tiny_run import tiny_recipe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.experts import MLP
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Mesh, MeshShape, Network, Transport
from moestro.parallel.restore import Files
from moestro.parallel.transports import Chunked, Granular, Linear, Measured, measured
from moestro.parallel.transports import granular as granular_transport
from moestro.routing import SparseRouting
from moestro.train import Recipe
from moestro.train.progress import Silent
from moestro.train.run import train_models
from moestro.train.team import Team

WIDTH, EXPERTS = 6, 4


class Sleeping(Transport):
    """The plain exchange after a sleep on one rank, there and back."""

    def __init__(self, rank: int, there: float, back: float = 0.0) -> None:
        self.rank, self.there, self.back = rank, there, back

    def carry(self, trip: Any, rows: Tensor, load: Tensor) -> Tensor:
        here = trip.network.expert.rank == self.rank
        time.sleep(self.there * here)
        return Linear().carry(trip, _Sleep.apply(rows, self.back * here), load)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


def choices(rank: int, seconds: float) -> dict[str, Any]:
    """What is chosen, and sent, as loads change and gradients are recorded or not."""
    ways = {"slow back": Sleeping(1, 0, 4 * seconds), "slow there": Sleeping(0, 2 * seconds)}
    ways["slow"] = Sleeping(1, 6 * seconds)
    transport = Measured(bucket=8, repeats=1, ways=ways)
    mesh = Mesh(MeshShape(expert=2))
    mesh.node = mesh.across = None  # as where nodes have unequal shares: experts do not travel
    layer, network = _layer(mesh, transport)
    said = []
    for tokens, learning in ((8, True), (8, True), (8, False), (40, True), (8, True), (8, False)):
        before = network.traffic.bytes(phase="trial")
        network.traffic.sent["dispatch", "forward", "intra"] = 0
        with torch.set_grad_enabled(learning):
            y = layer.run(torch.randn(tokens, WIDTH), _even(tokens))
        if learning:
            y.sum().backward()
        grads = [p.grad is not None for p in layer.parameters()]
        layer.zero_grad()
        said.append(
            {
                "tried": network.traffic.bytes(phase="trial") > before,
                "sent": network.traffic.bytes("dispatch", "forward", "intra"),
                "grads": all(grads) if learning else not any(grads),
            }
        )
    keys = {f"{key[0]} {key[1]}": [choice.degree, choice.way] for key, choice in transport.choices.items()}
    again = Measured(bucket=8, repeats=1, ways=ways)
    other, network = _layer(mesh, again)
    again.take(transport.state())
    other.run(torch.randn(8, WIDTH), _even(8))
    foreign = Measured(bucket=9, repeats=1, ways=ways)
    _layer(mesh, foreign)
    foreign.take(transport.state())
    seconds_of = {f"{c.degree} {c.way}": s for c, s in next(iter(transport.seconds.values())).items()}
    return {
        "calls": said,
        "chosen": keys,
        "taken": {f"{c.degree} {c.way}": n for c, n in transport.taken.items()},
        "restored": again.choices == transport.choices,
        "tried again": network.traffic.bytes(phase="trial"),
        "foreign": len(foreign.choices),
        "seconds": seconds_of,
    }


def sliced(rank: int, _: None) -> dict[str, Any]:
    """On a mesh with slices and nodes: candidates, and whether a trial leaves anything behind."""
    found: dict[str, Any] = {}
    for name, shape in (("slices", MeshShape(tensor=4)), ("nodes", MeshShape(expert=4))):
        mesh, transport = Mesh(shape, ranks_per_node=2), Measured()
        layer, _network = _layer(mesh, transport)
        state = torch.get_rng_state()
        untried = _gradients(_layer(mesh, Linear())[0], lambda run, x: run(x))
        plain = _gradients(layer, lambda run, x: run(x))
        found[name] = [[c.degree, c.way] for c in next(iter(transport.seconds.values()))]
        transport.choices.clear()
        again = _gradients(layer, lambda run, x: checkpoint(run, x, use_reentrant=False))
        (choice, *more) = transport.choices.values()
        found[f"{name} apart"] = max(
            float((a - b).abs().max()) for each in (plain, again) for a, b in zip(each, untried, strict=True)
        )
        found[f"{name} chosen"] = [choice.degree, choice.way, len(more)]
        found[f"{name} random"] = torch.equal(state, torch.get_rng_state())
    return found


def _gradients(layer: nn.Module, way: Callable[..., Tensor], tokens: int = 12) -> list[Tensor]:
    layer.zero_grad()
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    y = way(lambda x: layer.run(x, _even(tokens, torch.float64)), x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def _layer(mesh: Mesh, transport: Transport) -> tuple[ParallelExperts, Network]:
    torch.manual_seed(0)
    bank, slots = MLP(EXPERTS, WIDTH, 8, kernel="loop"), EXPERTS // mesh.shape.expert
    first = mesh.experts.get_local_rank("expert") * slots
    local = bank.share(range(first, first + slots)).slice(mesh.experts.get_local_rank("tensor"), mesh.shape.tensor)
    network = Network(mesh)
    layer = ParallelExperts(local, mesh, transport=transport, network=network)
    return (layer.double() if mesh.shape.ranks == 4 else layer), network


def _even(tokens: int, dtype: torch.dtype = torch.float32) -> SparseRouting:
    index = torch.arange(tokens).unsqueeze(1) % EXPERTS
    return SparseRouting.from_choice(index, torch.ones(index.shape, dtype=dtype), EXPERTS)


def resumed_runs(rank: int, folder: str) -> dict[str, Any]:
    """A run whose transport measures, once whole and once cut short and resumed: how many trials each made."""
    place, team, counted = Path(folder), Team(rank, 2, rank, 2), [0]
    plain = measured.trial_seconds

    def counting(*given: Any) -> float:
        counted[0] += 1
        return plain(*given)

    measured.trial_seconds = counting
    words = team.by_first(lambda: _recipe(place).model_dump(mode="json"))
    trials = {}
    for name, transport in (("whole", "measured"), ("again", "measured"), ("linear", "linear")):
        words["parallel"] |= {"transport": transport, "mesh": "expert=2"}
        if name == "again":
            team.by_first(lambda: _cut_short(place / "whole", place / "again"))
        how: dict[str, Any] = {"progress": Silent(), "overwrite": False, "team": team}
        train_models(Recipe.model_validate(words), place / name, resume=name == "again", **how)
        trials[name], counted[0] = counted[0], 0
    measured.trial_seconds = plain
    return trials


def _recipe(place: Path) -> Recipe:
    settings = {"steps": 8, "checkpoint_every": 4, "keep_every": 4, "evaluate_every": 3, "precision": "float64"}
    return tiny_recipe(place / "text.txt", batch_size=4, statistics="step", accumulate=2, **settings)


def _cut_short(finished: Path, copy: Path) -> None:
    """A copy of a run as it was after step 4."""
    shutil.copytree(finished, copy)
    (copy / "result.json").unlink()


def granular(rank: int, _: None) -> dict[str, Any]:
    """Parts of loads of several sizes where the clock says that a part of 16 rows is best, and strategies."""
    asked, real = list[int](), granular_transport.trial_seconds

    def seconds(chunked: Chunked, trip: Any, rows: Tensor, load: Tensor, repeats: int) -> float:
        asked.append(chunked.chunks)
        return real(chunked, trip, rows, load, repeats) * 0 + abs(chunked.chunks - len(rows) / 16)

    granular_transport.trial_seconds = seconds
    mesh, transport = Mesh(MeshShape(expert=2), ranks_per_node=1), Granular(repeats=1)
    layer, network = _layer(mesh, transport)
    layer.double()
    plain, _network = _layer(mesh, Linear())
    plain.double()
    parts, counts, apart = [], [], 0.0
    for tokens in (16, 64, 32, 48, 64, 500):
        asked.clear()
        taken = dict(transport.taken)
        ours, theirs = (_gradients(each, lambda run, x: run(x), tokens) for each in (layer, plain))
        ((number, _strategy),) = [key for key, n in transport.taken.items() if n > taken.get(key, 0)]
        parts.append([tokens, number])
        counts.append(len(asked))
        apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)))
    again = Granular(repeats=1)
    other, network = _layer(mesh, again)
    again.take(transport.state())
    _gradients(other.double(), lambda run, x: run(x), 64)
    restored = {key: each.found for key, each in again.intervals.items()} == {
        key: each.found for key, each in transport.intervals.items()
    }
    granular_transport.trial_seconds = real
    return {
        "parts": parts,
        "asked": counts,
        "apart": apart,
        "restored": restored,
        "tried again": network.traffic.bytes(phase="trial"),
        **_limited(mesh),
    }


def _limited(mesh: Mesh) -> dict[str, Any]:
    """Strategies under limits of memory, of 12 rows of 6 numbers with a middle of 8."""
    found: dict[str, Any] = {"limits": {}}
    with TemporaryDirectory() as folder:
        every = 12 * (WIDTH + 8) * 8
        cases = {"none": (every, Files(folder)), "files": (every - 1, Files(folder)), "sends": (every - 1, None)}
        for name, (memory, store) in cases.items():
            limited = Granular(parts=(2,), memory=memory, store=store, repeats=1)
            layer, _network = _layer(mesh, limited)
            _gradients(layer.double(), lambda run, x: run(x))
            ((_parts, strategy),) = limited.taken
            found["limits"][name] = strategy
            found["rates"] = vars(next(iter(limited.rates.values())))
            copied = Granular(parts=(2,), memory=memory, store=store)
            _layer(mesh, copied)
            copied.take(limited.state())
            assert copied.rates == limited.rates
    layer, _network = _layer(mesh, Granular(memory=100))
    try:
        _gradients(layer.double(), lambda run, x: run(x))
    except ValueError as error:
        found["too little"] = str(error)
    return found
