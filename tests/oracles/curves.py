"""Loss curves of one training whose sums are added up in different orders, with its own routes or forced ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from moestro.balance import RoutingLog
from moestro.data import Batches, Share
from moestro.layers import MoE
from moestro.parallel import Mesh
from moestro.routing import Selection
from moestro.train.build import build_corpus, build_model, mesh_shape, training_batches
from moestro.train.machine import choose_machine, repeatable
from moestro.train.optimiser import build_optimiser, set_learning_rate
from moestro.train.part import take_part
from moestro.train.recipe import Recipe
from moestro.train.schedule import schedule
from moestro.train.step import Stepper
from moestro.train.team import ALONE, Team, joined_by_file

Routes = list[list[Tensor]]  # of every step, of every call of a router, `[tokens, k]`


@dataclass
class Curve:
    """Losses of every step, and what every router chose for every token."""

    losses: Tensor
    routes: Routes

    def switches(self, other: Curve) -> list[int]:
        """Of every step, how many choices of all layers' tokens are not those of the other."""
        pairs = zip(self.routes, other.routes, strict=True)
        return [sum(_switched(x, y) for x, y in zip(_by_layer(a), _by_layer(b), strict=True)) for a, b in pairs]

    def distance(self, other: Curve) -> Tensor:
        """Of the losses, step by step."""
        return (self.losses - other.losses).abs()


LAYERS = 4


def _by_layer(calls: list[Tensor]) -> list[Tensor]:
    """The choices of a step, micro-batch after micro-batch, for each layer."""
    return [torch.cat(calls[layer::LAYERS]) for layer in range(min(LAYERS, len(calls)))]


def _switched(a: Tensor, b: Tensor) -> int:
    return int((a.sort().values != b.sort().values).any(-1).sum())


def curve(
    recipe: Recipe, steps: int, *, team: Team = ALONE, forced: Routes | None = None, accumulate: int = 1
) -> Curve:
    """Train for some steps as `moestro train` would; with forced routes every router chooses as they say.

    Of several micro-batches, whose auxiliary loss is that of the whole step, only another order of sums remains.
    """
    settings, machine = recipe.train, choose_machine("cpu", recipe.train.precision, recipe.train.threads)
    with repeatable(machine):
        corpus = build_corpus(recipe.data)
        model = build_model(
            recipe.model,
            vocab_size=corpus.tokenizer.vocab_size,
            sequence_length=recipe.data.sequence_length,
            seed=recipe.seed,
        ).to(machine.weights)
        mesh = None
        if team.size > 1:
            mesh = Mesh(mesh_shape(recipe.parallel.mesh, team.size, recipe.model.num_experts))
        part = take_part(model, team, mesh, recipe.parallel)
        betas = (settings.beta1, settings.beta2)
        optimiser = build_optimiser(model, learning_rate=1.0, weight_decay=settings.weight_decay, betas=betas)
        log, hook = RoutingLog(model), _Hook(team, forced)
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.select.register_forward_hook(hook)
        stepper = Stepper(
            model,
            optimiser,
            machine,
            log,
            accumulate=accumulate,
            clip=settings.clip,
            statistics="step",
            exchange=part.exchange,
        )
        share = schedule(
            settings.schedule,
            steps=settings.steps,
            warmup_fraction=settings.warmup_fraction,
            decay_fraction=settings.decay_fraction,
            final_fraction=settings.final_fraction,
        )
        batches: Batches = training_batches(corpus, recipe, Share(team.rank, team.size))
        losses = []
        for step in range(steps):
            hook.begin(step)
            set_learning_rate(optimiser, settings.learning_rate * share(step))
            losses.append(stepper(batches.at(step), step + 1).loss)
    return Curve(torch.tensor(losses, dtype=torch.float64), hook.seen)


class _Hook:
    """Notes what a `select` chose, or has it choose what was noted by one process."""

    def __init__(self, team: Team, forced: Routes | None) -> None:
        self.team, self.forced, self.seen = team, forced, Routes()

    def begin(self, step: int) -> None:
        self.seen.append([])
        self.step = step

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], chosen: Selection) -> Selection | None:
        now = self.seen[-1]
        if not torch.is_grad_enabled():  # the look at a step's statistics
            return None
        now.append(chosen.index.to(torch.int16))
        if self.forced is None:
            return None
        index = self.forced[self.step][len(now) - 1].chunk(self.team.size)[self.team.rank]
        return replace(chosen, index=index.to(chosen.index.dtype))


def curve_of_several(recipe: Recipe, steps: int, processes: int, folder: Path, forced: Routes | None) -> Curve:
    """The same by several processes; routes are those of the first one's tokens."""
    folder.mkdir()
    mp.spawn(_rank, args=(recipe, steps, processes, folder, forced), nprocs=processes)
    losses = torch.frombuffer(bytearray((folder / "losses").read_bytes()), dtype=torch.float64)
    return Curve(losses, [])


def _rank(rank: int, recipe: Recipe, steps: int, processes: int, folder: Path, forced: Routes | None) -> None:
    torch.set_num_threads(1)
    with joined_by_file(folder / "meet", rank, processes, 300) as team:
        found = curve(recipe, steps, team=team, forced=forced)
    if rank == 0:
        (folder / "losses").write_bytes(found.losses.numpy().tobytes())
