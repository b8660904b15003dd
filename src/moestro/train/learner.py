"""What a run changes: a model, its optimiser, how far they have come; saved, and put back."""

from __future__ import annotations

import time
from pathlib import Path

from moestro.balance import RoutingLog
from moestro.layers import MoE
from moestro.models import DecoderLM
from moestro.train.checkpoints import Checkpoints
from moestro.train.goodput import Goodput
from moestro.train.learned_ways import take_ways, ways_kept
from moestro.train.optimiser import build_optimiser
from moestro.train.part import take_part
from moestro.train.placing import found, kept, rebalancer_of
from moestro.train.recipe import TrainSection
from moestro.train.state import Checkpoint, capture, restore
from moestro.train.surroundings import Surroundings


class Learner:
    """A model that is being trained, as far as this process holds it.

    Args:
        name: how it is called in progress and result, "moe" or "dense twin".
        model: with fresh weights, the same in every process.
        folder: of its files.
        around: what it shares with the other model of the run.

    Attributes:
        part: what this process holds of the model, and does.
        log: of its MoE layers; None for a dense model.
        rebalancer: what moves experts between processes; None = they stay.
        counts: parameters of the whole model.
        step: optimiser steps done.
        saved_step: those in the newest checkpoint.
        goodput: what its time was spent on.
    """

    def __init__(self, name: str, model: DecoderLM, folder: Path, around: Surroundings):
        self.name, self.around, settings = name, around, around.recipe.train
        self.counts = model.parameter_counts()
        model.to(around.machine.device, around.machine.weights)
        self.part = take_part(model, around.team, around.mesh, around.recipe.parallel)
        self.model = model
        sparse = any(isinstance(module, MoE) for module in model.modules())
        self.log = RoutingLog(model, settings.layers) if sparse else None
        self.optimiser = build_optimiser(
            model,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
            kept=self.part.keeps,
        )
        self.rebalancer = rebalancer_of(model, around.mesh, around.recipe.parallel.placement)
        self.checkpoints = checkpoints_of(folder, settings)
        self.step = self.saved_step = 0
        self.goodput = Goodput()
        self._seconds, self._started = 0.0, time.monotonic()

    def start_clock(self) -> None:
        """From now on time is spent on this model."""
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds spent on this model, also before it was stopped."""
        return self._seconds + time.monotonic() - self._started

    def newest(self) -> Checkpoint | None:
        """Its newest checkpoint that is whole."""
        return self.checkpoints.latest(self.around.progress.say, self.around.team)

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False where there is none."""
        team, checkpoint = self.around.team, self.newest()
        if checkpoint is None:
            return False
        team.together(lambda: self.around.compare(checkpoint))
        team.together(lambda: self.take(checkpoint))
        self._seconds, self.goodput = checkpoint.seconds, Goodput(checkpoint.spent)
        return True

    def take(self, checkpoint: Checkpoint) -> None:
        """Be as this checkpoint was; the time that was spent since is not given back."""
        if self.rebalancer is not None:  # first, because it says which experts this process holds
            self.rebalancer.take(found(checkpoint.tensors))
        take_ways(self.model, self.around.mesh, checkpoint.tensors)
        restore(checkpoint, self.model, self.optimiser, self.part)
        self.step = self.saved_step = checkpoint.step

    def captured(self, bits_per_byte: float | None = None) -> Checkpoint:
        """Everything of it that changes, as far as this process has to write it."""
        return capture(
            self.model,
            self.optimiser,
            self.step,
            self.elapsed(),
            self.around.fingerprint,
            spent=self.goodput.seconds,
            bits_per_byte=bits_per_byte,
            part=self.part,
            more=kept(self.rebalancer) | ways_kept(self.model, self.around.mesh, self.around.team),
        )

    def save(self, bits_per_byte: float | None) -> None:
        """Write a checkpoint; raises OSError where the disk refuses, and the ones before are untouched."""
        with self.goodput.spent("checkpoint"):
            self.checkpoints.save(self.captured(bits_per_byte), self.around.team)
            self.saved_step = self.step


def checkpoints_of(folder: Path, settings: TrainSection) -> Checkpoints:
    """The checkpoints of the model whose files are in `folder`."""
    return Checkpoints(folder / "checkpoint", settings.keep_last, settings.keep_best, settings.keep_every)
