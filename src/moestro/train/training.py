"""The training of one model, from its first step or from where it was stopped, to its result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moestro.data import Batch, Share
from moestro.inference import Evaluation, evaluate
from moestro.layers import MoE
from moestro.models import DecoderLM
from moestro.train.bad_numbers import BadNumbers
from moestro.train.build import training_batches, validation_batches
from moestro.train.errors import NonFiniteLoss, Stopped
from moestro.train.interrupt import StopRequested
from moestro.train.learner import Learner
from moestro.train.optimiser import set_learning_rate
from moestro.train.outcome import write_outcome
from moestro.train.placing import in_words, layers_of
from moestro.train.records import Records, metrics_of, seconds_of
from moestro.train.schedule import schedule
from moestro.train.seeds import seed_everything, stream
from moestro.train.step import Stepper
from moestro.train.surroundings import Surroundings
from moestro.train.witness import Witness


class Training:
    """Trains one model in one folder; see `run`.

    Args:
        name: how the model is called in progress and result, "moe" or "dense twin".
        model: with fresh weights.
        folder: where its files go.
        around: what it shares with the other model of the run.
    """

    def __init__(self, name: str, model: DecoderLM, folder: Path, around: Surroundings):
        self.folder, self.around, self.settings = folder, around, around.recipe.train
        self.learner = Learner(name, model, folder, around)
        self.share = Share(around.team.rank, around.team.size)
        self.batches = training_batches(
            around.corpus, around.recipe, replace(self.share, accumulate=self.settings.accumulate)
        )
        self.records: Records
        self.bad_numbers: BadNumbers

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate, save the model; the content of result.json.

        Raises Stopped, after saving `checkpoint/`, when a signal asked for it.
        """
        self.around.team.by_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._begin()
        progress, learner = self.around.progress, self.learner
        progress.begin(learner.name, learner.step, self.settings.steps, self.settings.log_every)
        try:
            with Records(self.folder, learner) as self.records:
                self.bad_numbers = BadNumbers(learner, self.records, self.folder)
                learner.start_clock()
                return write_outcome(self.folder, learner, self.records, *self._loop())
        finally:
            progress.end()

    def _begin(self) -> None:
        """From the newest checkpoint, if there is one, and say what an earlier life did in vain."""
        seed_everything(self.around.recipe.seed)
        say, learner = self.around.progress.say, self.learner
        if learner.resume():
            say(f"{learner.name}: resumed after step {learner.step}")
        metrics = metrics_of(self.folder)
        if metrics and metrics[-1]["step"] > learner.step:
            learner.goodput.lose(seconds_of(metrics, learner.step, self.around.tokens_per_step))
            last = metrics[-1]["step"]
            say(f"{learner.name}: steps {learner.step + 1} to {last} are done again, they were not saved")

    def _loop(self) -> tuple[Evaluation, Witness | None]:
        """Steps and evaluations in turn; the last evaluation is the result, and is watched."""
        stepper, learner, steps = self._stepper(), self.learner, self.settings.steps
        share = schedule(
            self.settings.schedule,
            steps=steps,
            warmup_fraction=self.settings.warmup_fraction,
            decay_fraction=self.settings.decay_fraction,
            final_fraction=self.settings.final_fraction,
        )
        try:
            while learner.step < steps:
                if self._evaluation_due():
                    self._evaluate(self.settings.evaluation_batches)
                if self._checkpoint_due():
                    self._save_or_say()
                self.around.interrupt.check()
                self._one_step(stepper, self.settings.learning_rate * share(learner.step))
            witness = Witness(learner.log, self.around.corpus) if learner.log is not None else None
            return self._evaluate(self.settings.final_evaluation_batches, witness), witness
        except StopRequested:
            learner.save(self.records.bits_per_byte)
            raise Stopped(
                f"stopped after step {learner.step} of {steps} and saved; --resume continues",
                learner.step,
                self.around.interrupt.signal_number or 2,
            ) from None

    def _stepper(self) -> Stepper:
        learner = self.learner
        return Stepper(
            learner.model,
            learner.optimiser,
            self.around.machine,
            learner.log,
            accumulate=self.settings.accumulate,
            clip=self.settings.clip,
            compiled=compile_around_experts(learner.model) if self.settings.compile else None,
            statistics=self.settings.statistics,
            exchange=learner.part.exchange,
            check_every=self.settings.check_every,
        )

    def _one_step(self, stepper: Stepper, learning_rate: float) -> None:
        started, learner = time.perf_counter(), self.learner
        set_learning_rate(learner.optimiser, learning_rate)
        with learner.goodput.spent("data"):
            batch = self.batches.at(learner.step)
        if self.share.index:  # the first process draws on, the others begin anew: a checkpoint keeps one state
            seed_everything(stream(self.around.recipe.seed, learner.step, self.share.index))
        if self.bad_numbers.leaves_out(learner.step + 1):
            learner.step += 1
            return
        try:
            with learner.goodput.spent("productive"):
                result = stepper(batch, learner.step + 1)
        except NonFiniteLoss as error:
            self.bad_numbers.met(error, learning_rate, stepper.random_state)
            return
        learner.step += 1
        self._move_experts()
        speed = self.around.tokens_per_step / (time.perf_counter() - started)
        self.records.step(result, learning_rate, speed)

    def _move_experts(self) -> None:
        """Let experts change their process, if this step decides so, and say what moved."""
        learner = self.learner
        moved = {} if learner.rebalancer is None else learner.rebalancer.step(learner.optimiser)
        if moved:
            self.records.event(learner.step, "placement", layers=layers_of(moved))
            self.around.progress.say(f"{learner.name} step {learner.step}: {in_words(moved)}")

    def _evaluation_due(self) -> bool:
        step, done = self.learner.step, [record["step"] for record in self.records.evaluations.records]
        return step > 0 and step % self.settings.evaluate_every == 0 and step not in done

    def _evaluate(self, count: int, witness: Witness | None = None) -> Evaluation:
        """Loss on validation text, written down; the witness, if any, sees how each batch was routed."""
        with self.learner.goodput.spent("evaluation"):
            measured = self._measured(count, witness)
        step = self.learner.step
        if not math.isfinite(measured.loss):
            raise NonFiniteLoss(f"the validation loss is {measured.loss} after step {step}", step)
        record = {"step": step, "validation_loss": measured.loss, "bits_per_byte": measured.bits_per_byte}
        self.records.evaluations.append(record)
        self.around.progress.evaluated(record)
        return measured

    def _measured(self, count: int, witness: Witness | None) -> Evaluation:
        around, parts = self.around, self.settings.accumulate
        size, length = self.settings.batch_size // parts, around.recipe.data.sequence_length
        batches = validation_batches(around.corpus.validation, size, length, count * parts, self.share)
        measured = evaluate(
            self.learner.model,
            self._watched(batches, witness),
            precision=around.machine.precision,
            together=around.team.summed,
        )
        if witness is not None:
            witness.add_up(around.team.summed)
        return measured

    def _watched(self, batches: Iterable[Batch], witness: Witness | None) -> Iterator[Batch]:
        """The batches; an evaluation may stop between two of them, and a witness sees how each was routed."""
        for batch in batches:
            self.around.interrupt.check()
            if witness is None:
                yield batch
            else:
                with witness.watching(batch):
                    yield batch

    def _checkpoint_due(self) -> bool:
        every, step = self.settings.checkpoint_every, self.learner.step
        return every > 0 and step > self.learner.saved_step and step % every == 0

    def _save_or_say(self) -> None:
        """A checkpoint on the way; where the disk refuses, the run goes on with the ones before."""
        try:
            self.learner.save(self.records.bits_per_byte)
        except OSError as error:
            say = self.around.progress.say
            say(f"step {self.learner.step} could not be saved: {error}; the run goes on without it")


def compile_around_experts(model: DecoderLM) -> Any:
    """The model compiled except for its MoE layers: how many rows an expert gets is known only as it runs."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    return torch.compile(model)
