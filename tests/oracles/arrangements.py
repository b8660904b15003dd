"""A tiny language model trained for a few steps by processes arranged in many ways, started once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.multiprocessing as mp
from oracles.faulty_disk import FULL, Counter, fail, intercepted

import moestro
from moestro.balance import RoutingLog
from moestro.data import Batch, Share
from moestro.parallel import Mesh
from moestro.parallel.gradients import here
from moestro.train.build import mesh_shape
from moestro.train.checkpoint_files import read_checkpoint, write_checkpoint
from moestro.train.errors import NonFiniteLoss
from moestro.train.fragments import Pieces
from moestro.train.machine import choose_machine
from moestro.train.optimiser import build_optimiser
from moestro.train.part import Part, take_part
from moestro.train.recipe import ParallelSection
from moestro.train.state import Checkpoint, capture, restore
from moestro.train.step import Stepper
from moestro.train.team import ALONE, Team, joined_by_file

EXPERTS, LENGTH = 4, 8


@dataclass(frozen=True)
class Arrangement:
    """So many processes in a mesh."""

    processes: int = 1
    mesh: str = "auto"
    shard_optimiser: bool = False
    transport: str = "linear"
    shard_dense: bool = False

    @property
    def name(self) -> str:
        shares = f"{' optimiser shared' * self.shard_optimiser}{' dense shared' * self.shard_dense}"
        return f"{self.processes} {self.mesh}{shares} {self.transport}"


@dataclass
class Run:
    """A model with all that trains it, as one process has it."""

    team: Team
    model: torch.nn.Module
    optimiser: torch.optim.Optimizer
    part: Part
    stepper: Stepper

    def step(self, step: int) -> list[float]:
        batch = shared(whole_batch(step), Share(self.team.rank, self.team.size, self.stepper.accumulate))
        result = self.stepper(batch, step)
        return [result.loss, result.grad_norm, result.auxiliary_loss, *result.named.values()]

    def capture(self, step: int) -> Checkpoint:
        return capture(self.model, self.optimiser, step, 0.0, part=self.part)


def whole_batch(step: int, rows: int = 8) -> Batch:
    tokens = torch.randint(16, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    domain = torch.zeros(rows, LENGTH, dtype=torch.uint8)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), domain, rows * LENGTH)


def shared(batch: Batch, share: Share) -> Batch:
    pick = torch.from_numpy(share.of(torch.arange(len(batch.tokens)).numpy()))
    return Batch(batch.tokens[pick], batch.targets[pick], batch.domain[pick], batch.num_bytes)


def fresh(team: Team, arrangement: Arrangement, method: str, accumulate: int = 1) -> Run:
    """In float64, so that another order of additions is all but invisible."""
    model = moestro.build_language_model(
        vocab_size=16,
        width=8,
        num_layers=2,
        num_heads=2,
        method=method,
        options={"top_k": 2},
        num_experts=EXPERTS,
        expert_hidden=8,
        seed=0,
    )
    model.double()
    mesh = None if team.size == 1 else Mesh(mesh_shape(arrangement.mesh, team.size, EXPERTS))
    settings = ParallelSection(
        shard_optimiser=arrangement.shard_optimiser,
        shard_dense=arrangement.shard_dense,
        transport=arrangement.transport,
    )
    part = take_part(model, team, mesh, settings)
    optimiser = build_optimiser(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95), kept=part.keeps)
    machine, log = choose_machine("cpu", "float64", 1), RoutingLog(model)
    stepper = Stepper(model, optimiser, machine, log, accumulate=accumulate, exchange=part.exchange)
    return Run(team, model, optimiser, part, stepper)


@contextmanager
def team_of(arrangement: Arrangement, rank: int, meeting_place: Path) -> Iterator[Team]:
    if arrangement.processes == 1:
        yield ALONE
    else:
        with joined_by_file(meeting_place, rank, arrangement.processes, 60) as team:
            yield team


def reshard(rank: int, folder: str, arrangements: list[Arrangement], method: str) -> None:
    """Save from each arrangement after two steps, load in each, and compare; what was found goes to a file."""
    torch.set_num_threads(1)
    place = Path(folder)
    for number, source in enumerate(arrangements):
        if rank < source.processes:
            with team_of(source, rank, place / f"save{number}") as team:
                run = fresh(team, source, method)
                first = [run.step(1), run.step(2)]
                write_checkpoint(place / f"step-{number}", run.capture(2), team)
                third = run.step(3)
                if rank == 0:
                    (place / f"save{number}.json").write_text(json.dumps([*first, third]))
        _all_here(place / f"saved{number}", rank)
    for (to, target), (number, _) in product(enumerate(arrangements), enumerate(arrangements)):
        if rank < target.processes:
            with team_of(target, rank, place / f"load{number}to{to}") as team:
                run = fresh(team, target, method)
                saved = read_checkpoint(place / f"step-{number}", team)
                team.together(lambda run=run, saved=saved: restore(saved, run.model, run.optimiser, run.part))
                same = team.gather(_same(run, saved))
                third = run.step(3)
                if rank == 0:
                    (place / f"load{number}to{to}.json").write_text(json.dumps({"same": same, "third": third}))


def guard(rank: int, folder: str) -> None:
    """What every process says when one has a bad number; the step must not be taken."""
    place, said = Path(folder), {}
    plants = [(kind, plant, False) for kind, plant in PLANTED.items()]
    plants += [(f"{kind}, dense shared", plant, True) for kind, plant in PLANTED.items() if kind != "gradient"]
    plants.append(("share", _bad_share, True))
    for number, (kind, plant, shard_dense) in enumerate(plants):
        with joined_by_file(place / f"guard{number}", rank, 4, 60) as team:
            arrangement = Arrangement(4, "data=2,expert=2", shard_dense=shard_dense)
            run = fresh(team, arrangement, "deepseek-v3", accumulate=2)
            run.step(1)
            plant(run)
            before = [here(parameter).detach().clone() for parameter in run.model.parameters()]
            try:
                run.step(2)
                message = "nothing"
            except NonFiniteLoss as error:
                message = str(error)
            now = [here(parameter) for parameter in run.model.parameters()]
            kept = [torch.equal(*pair) for pair in zip(before, now, strict=True)]
            said[kind] = team.gather([message, all(kept) or kind.startswith(("weight", "share"))])
    said["full disk"] = _full_disk(rank, place)
    if rank == 0:
        (place / "guard.json").write_text(json.dumps(said))


def _full_disk(rank: int, place: Path) -> list[str]:
    """What every process says of a save that fails in one of them, and what that save leaves."""
    with joined_by_file(place / "full", rank, 4, 60) as team:
        run = fresh(team, Arrangement(4, "expert=4"), "mixtral")
        with intercepted(Counter(1, fail(FULL)) if rank == 2 else Counter(), ("fsync",)):
            try:
                write_checkpoint(place / "full-step", run.capture(0), team)
                message = "nothing"
            except OSError as error:
                message = str(error)
        team.gather(None)
        left = sorted(path.name for path in place.glob("full-step*"))
        return [*team.gather(message), *left]


def _bad_weight(run: Run) -> None:
    experts = run.model.layers[1].moe.experts
    here = list(experts.placement.experts_of(experts.network.expert.rank))
    if 3 in here:
        experts.local.down.data[here.index(3), 0, 0] = float("nan")


def _bad_share(run: Run) -> None:
    if run.team.rank == 3:
        here(run.model.layers[0].attention.output.weight.data)[0, 0] = float("inf")


def _bad_output(run: Run) -> None:
    if run.team.rank == 2:
        run.model.layers[0].attention.output.register_forward_hook(lambda m, given, y: y * float("inf"))


def _bad_gradient(run: Run) -> None:
    if run.team.rank == 1:
        parameter = run.model.layers[0].attention_norm.weight
        parameter.register_hook(lambda gradient: gradient * float("nan"))


PLANTED = {"weight": _bad_weight, "output": _bad_output, "gradient": _bad_gradient}


def _same(run: Run, saved: Checkpoint) -> list[int]:
    """How many of the pieces that this process would write are bit for bit those saved, and how many not."""
    pieces, outcome = Pieces(saved.tensors), [0, 0]
    for name, tensor in run.capture(2).tensors.items():
        if "[" not in name and "{" in name:
            first, end = (int(each) for each in name.partition("{")[2].rstrip("}").split(":"))
            expected = pieces.read(name.partition("{")[0])[first:end]
            outcome[0 if torch.equal(tensor.detach(), expected) else 1] += 1
            continue
        base, _, row = name.partition("[")
        expected = pieces.read(base, int(row.partition("]")[0]) if row else None)
        cut = None if "{" not in row else row.partition("{")[2]
        if cut is not None:
            part, parts, dim = (int(each) for each in cut.rstrip("}").replace("of", "@").split("@"))
            expected = expected.chunk(parts, dim)[part]
        outcome[0 if torch.equal(tensor.detach(), expected) else 1] += 1
    return outcome


def _all_here(place: Path, rank: int, processes: int = 4) -> None:
    """Wait until every process has come; those outside a team have no other way to agree."""
    with joined_by_file(place, rank, processes, 120) as team:
        team.gather(rank)


def run_all(folder: Path, arrangements: list[Arrangement], method: str) -> None:
    mp.spawn(_work, args=(str(folder), arrangements, method), nprocs=4)


def _work(rank: int, folder: str, arrangements: list[Arrangement], method: str) -> None:
    reshard(rank, folder, arrangements, method)
    guard(rank, folder)
