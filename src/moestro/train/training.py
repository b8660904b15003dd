"""The training of one model, from its first step or from where it was stopped, to its result."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from moestro.balance import RoutingLog
from moestro.data import Batch, Corpus, Share
from moestro.inference import Evaluation, evaluate
from moestro.layers import MoE
from moestro.models import DecoderLM, save_model
from moestro.parallel import Mesh
from moestro.train.build import training_batches, validation_batches
from moestro.train.checkpoints import Checkpoints
from moestro.train.errors import NonFiniteLoss, Stopped
from moestro.train.files import JsonLines, read_lines, write_json
from moestro.train.goodput import Goodput
from moestro.train.interrupt import Interrupt, StopRequested
from moestro.train.machine import Machine, versions
from moestro.train.optimiser import build_optimiser, set_learning_rate
from moestro.train.part import take_part
from moestro.train.progress import Progress
from moestro.train.recipe import Recipe, TrainSection
from moestro.train.repro import FailedStep, with_random_state, write_repro
from moestro.train.schedule import schedule
from moestro.train.spikes import spike
from moestro.train.state import Checkpoint, capture, restore
from moestro.train.step import Stepper, StepResult
from moestro.train.team import ALONE, Team
from moestro.train.witness import Witness

ONE_PROCESS = "one process"
MOST_BAD_STEPS = 10  # in a hundred; more are no accident


@dataclass(frozen=True)
class Surroundings:
    """What the models of a run share."""

    recipe: Recipe
    machine: Machine
    corpus: Corpus
    progress: Progress
    interrupt: Interrupt
    team: Team = ALONE
    mesh: Mesh | None = None

    @property
    def mesh_words(self) -> str:
        """How the processes are arranged."""
        return ONE_PROCESS if self.mesh is None else self.mesh.shape.words

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a resumed run must share with the one before to repeat it exactly."""
        return {
            "corpus": self.corpus.fingerprint,
            "torch": torch.__version__,
            "threads": str(self.machine.threads),
            "device": self.machine.device.type if self.team.size > 1 else str(self.machine.device),
            "precision": self.machine.precision_name,
            "mesh": self.mesh_words,
        }


class Training:
    """Trains one model in one folder; see `run`.

    Args:
        name: how the model is called in progress and result, "moe" or "dense twin".
        model: with fresh weights.
        folder: where its files go.
        around: what it shares with the other model of the run.
    """

    def __init__(self, name: str, model: DecoderLM, folder: Path, around: Surroundings):
        self.name, self.folder, self.around = name, folder, around
        self.settings = around.recipe.train
        self.counts = model.parameter_counts()
        model.to(around.machine.device, around.machine.weights)
        self.part = take_part(model, around.team, around.mesh, around.recipe.parallel)
        self.model = model
        sparse = any(isinstance(module, MoE) for module in model.modules())
        self.log = RoutingLog(model, self.settings.layers) if sparse else None
        self.optimiser = build_optimiser(
            model,
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            betas=(self.settings.beta1, self.settings.beta2),
            kept=self.part.keeps,
        )
        self.share = Share(around.team.rank, around.team.size)
        self.batches = training_batches(
            around.corpus, around.recipe, replace(self.share, accumulate=self.settings.accumulate)
        )
        self.step, self.seconds, self._started = 0, 0.0, time.monotonic()
        self.goodput, self._saved_step = Goodput(), 0
        self._left_out: set[int] = set()  # steps whose batch met a bad number
        self.checkpoints = checkpoints_of(folder, self.settings)
        self.metrics: JsonLines
        self.evaluations: JsonLines
        self.routing: JsonLines
        self.events: JsonLines

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate, save the model; the content of result.json.

        Raises Stopped, after saving `checkpoint/`, when a signal asked for it.
        """
        team = self.around.team
        team.by_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._begin()
        progress, steps = self.around.progress, self.settings.steps
        progress.begin(self.name, self.step, steps, self.settings.log_every)
        try:
            with self._files():
                self._started = time.monotonic()
                return self._finish(*self._loop())
        finally:
            progress.end()

    def _begin(self) -> None:
        seed_everything(self.around.recipe.seed)
        say, team = self.around.progress.say, self.around.team
        checkpoint = self.checkpoints.latest(say, team)
        if checkpoint is not None:
            team.together(lambda: self._compare(checkpoint))
            team.together(lambda: restore(checkpoint, self.model, self.optimiser, self.part))
            self.step, self.seconds, self._saved_step = checkpoint.step, checkpoint.seconds, checkpoint.step
            self.goodput = Goodput(checkpoint.spent)
            say(f"{self.name}: resumed after step {self.step}")
        lost = [record for record in read_lines(self.folder / "metrics.jsonl") if record["step"] > self.step]
        if lost:
            self.goodput.lose(sum(self._tokens_per_step / record["tokens_per_second"] for record in lost))
            say(f"{self.name}: steps {self.step + 1} to {lost[-1]['step']} are done again, they were not saved")

    def _compare(self, checkpoint: Checkpoint) -> None:
        now, before = self.around.fingerprint, checkpoint.fingerprint
        if before.get("corpus") != now["corpus"]:
            raise ValueError("the text has changed since this run was stopped; restore it, or start a new run")
        for name in sorted(now.keys() - {"corpus"}):
            if before.get(name, ONE_PROCESS if name == "mesh" else None) != now[name]:
                self.around.progress.say(
                    f"{name} was {before.get(name)} and is {now[name]}: the run will not repeat bit for bit"
                )

    def _loop(self) -> tuple[Evaluation, Witness | None]:
        """Steps and evaluations in turn; the last evaluation is the result, and is watched."""
        stepper = self._stepper()
        share = schedule(
            self.settings.schedule,
            steps=self.settings.steps,
            warmup_fraction=self.settings.warmup_fraction,
            decay_fraction=self.settings.decay_fraction,
            final_fraction=self.settings.final_fraction,
        )
        try:
            while self.step < self.settings.steps:
                if self._evaluation_due():
                    self._evaluate(self.settings.evaluation_batches)
                if self._checkpoint_due():
                    self._save_or_say()
                self.around.interrupt.check()
                self._one_step(stepper, self.settings.learning_rate * share(self.step))
            witness = Witness(self.log, self.around.corpus) if self.log is not None else None
            return self._evaluate(self.settings.final_evaluation_batches, witness), witness
        except StopRequested:
            self._save()
            raise Stopped(
                f"stopped after step {self.step} of {self.settings.steps} and saved; --resume continues",
                self.step,
                self.around.interrupt.signal_number or 2,
            ) from None

    def _stepper(self) -> Stepper:
        return Stepper(
            self.model,
            self.optimiser,
            self.around.machine,
            self.log,
            accumulate=self.settings.accumulate,
            clip=self.settings.clip,
            compiled=compile_around_experts(self.model) if self.settings.compile else None,
            statistics=self.settings.statistics,
            exchange=self.part.exchange,
            check_every=self.settings.check_every,
        )

    def _one_step(self, stepper: Stepper, learning_rate: float) -> None:
        started = time.perf_counter()
        set_learning_rate(self.optimiser, learning_rate)
        with self.goodput.spent("data"):
            batch = self.batches.at(self.step)
        if self.share.index:  # the first process draws on, the others begin anew: a checkpoint keeps one state
            seed_everything(stream(self.around.recipe.seed, self.step, self.share.index))
        if self.step + 1 in self._left_out:
            self.step += 1
            return
        try:
            with self.goodput.spent("productive"):
                result = stepper(batch, self.step + 1)
        except NonFiniteLoss as error:
            self._after_bad_number(error, learning_rate, stepper.random_state)
            return
        self.step += 1
        speed = self._tokens_per_step / (time.perf_counter() - started)
        self._record(result, learning_rate, speed)

    def _after_bad_number(self, error: NonFiniteLoss, learning_rate: float, state: Any) -> None:
        """Keep the step for `moestro replay`, then do what the recipe says: halt, skip or rollback."""
        policy, say = self.settings.on_non_finite, self.around.progress.say
        folder = self.folder / "repro"
        recently = [r for r in self.events.records if r["event"] == "non-finite" and r["step"] > self.step - 100]
        kept_step = bool(self.metrics.records)  # a run that fails at once leaves nothing behind
        if kept_step:
            write_repro(folder, self._failed(error, learning_rate, state), self.around.team)
        if policy == "halt":
            kept = f"; the step is kept: moestro replay {folder}" if kept_step else ""
            raise NonFiniteLoss(f"{error}{kept}", error.step, error.kind, error.name) from None
        if len(recently) >= MOST_BAD_STEPS:
            text = f"{error}; that is one of {len(recently) + 1} in 100 steps, which {policy} does not mend"
            raise NonFiniteLoss(text, error.step, error.kind, error.name) from None
        say(f"{error}; {policy}: the batch is left out")
        self._left_out.add(error.step)
        if policy == "rollback":
            self._go_back(error)
        else:
            self.step += 1
        self.events.append({"step": error.step, "event": "non-finite", "policy": policy, "what": str(error)})

    def _go_back(self, error: NonFiniteLoss) -> None:
        """Take the state of the newest whole checkpoint, and forget what was recorded since."""
        checkpoint = self.checkpoints.latest(self.around.progress.say, self.around.team)
        if checkpoint is None:
            raise NonFiniteLoss(
                f"{error}; there is no checkpoint to go back to: lower train.checkpoint_every",
                error.step,
                error.kind,
                error.name,
            ) from None
        lost = [record for record in self.metrics.records if record["step"] > checkpoint.step]
        self.goodput.lose(sum(self._tokens_per_step / record["tokens_per_second"] for record in lost))
        restore(checkpoint, self.model, self.optimiser, self.part)
        self.step = self._saved_step = checkpoint.step
        for file in (self.metrics, self.evaluations, *([self.routing] if self.log else [])):
            file.rewind(self.step)
        self.around.progress.say(f"{self.name}: back to step {self.step}")

    def _failed(self, error: NonFiniteLoss, learning_rate: float, state: Any) -> FailedStep:
        """The step as one process would do it: the whole batch, and what each process knows of the state."""
        around = self.around
        captured = capture(
            self.model, self.optimiser, self.step, self._elapsed(), around.fingerprint, part=self.part
        )
        return FailedStep(
            recipe=around.recipe,
            vocab_size=around.corpus.tokenizer.vocab_size,
            num_domains=len(around.corpus.domains),
            dense=self.log is None,
            learning_rate=learning_rate,
            state=with_random_state(captured, state) if around.team.first else captured,
            batch=training_batches(around.corpus, around.recipe).at(self.step),
            error=error,
        )

    def _record(self, result: StepResult, learning_rate: float, speed: float) -> None:
        record = result.named | {
            "step": self.step,
            "loss": result.loss,
            "lr": learning_rate,
            "tokens_per_second": speed,
            "grad_norm": result.grad_norm,
            "auxiliary_loss": result.auxiliary_loss,
        }
        height = spike([record["loss"] for record in self.metrics.records], result.loss)
        if height is not None:
            self.around.progress.say(
                f"{self.name}: the loss jumps to {result.loss:.4f} at step {self.step}, "
                f"{height:.0f} standard deviations above the last steps"
            )
            self.events.append({"step": self.step, "event": "loss spike", "deviations": height})
        self.metrics.append(record)
        if self.log is not None and (self.step % self.settings.log_every == 0 or self.step == self.settings.steps):
            routing = self.part.routing_record(self.step, self.log)
            for layer in routing["layers"]:
                layer["router_grad_norm"] = self._router_gradient(layer["name"], result.grad_norm)
            self.routing.append(routing)
            self.around.progress.load({layer["name"]: layer["load"] for layer in routing["layers"]})
        self.around.progress.step(record)

    def _router_gradient(self, layer: str, grad_norm: float) -> float | None:
        """Norm of a router's gradient before clipping; None if no parameter of it has one."""
        router = self.model.get_submodule(f"{layer}.router")
        gradients = [p.grad for p in router.parameters() if p.grad is not None]
        if not gradients:
            return None
        clipped = float(torch.nn.utils.get_total_norm(gradients))
        return clipped * (max(1.0, grad_norm / self.settings.clip) if self.settings.clip else 1.0)

    def _evaluation_due(self) -> bool:
        done = [record["step"] for record in self.evaluations.records]
        return self.step > 0 and self.step % self.settings.evaluate_every == 0 and self.step not in done

    def _checkpoint_due(self) -> bool:
        every = self.settings.checkpoint_every
        return every > 0 and self.step > self._saved_step and self.step % every == 0

    def _evaluate(self, count: int, witness: Witness | None = None) -> Evaluation:
        with self.goodput.spent("evaluation"):
            return self._measure(count, witness)

    def _measure(self, count: int, witness: Witness | None) -> Evaluation:
        around, parts = self.around, self.settings.accumulate
        size, length = self.settings.batch_size // parts, around.recipe.data.sequence_length
        batches = validation_batches(around.corpus.validation, size, length, count * parts, self.share)
        measured = evaluate(
            self.model,
            self._watched(batches, witness),
            precision=around.machine.precision,
            together=around.team.summed,
        )
        if witness is not None:
            witness.add_up(around.team.summed)
        if not math.isfinite(measured.loss):
            raise NonFiniteLoss(f"the validation loss is {measured.loss} after step {self.step}", self.step)
        record = {"step": self.step, "validation_loss": measured.loss, "bits_per_byte": measured.bits_per_byte}
        self.evaluations.append(record)
        around.progress.evaluated(record)
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

    def _finish(self, evaluation: Evaluation, witness: Witness | None) -> dict[str, Any]:
        """Write the model and its result; result.json, last, says that this model is done."""
        whole = self.part.whole(self.model)
        return self.around.team.by_first(lambda: self._write(whole, evaluation, witness))

    def _write(self, whole: DecoderLM, evaluation: Evaluation, witness: Witness | None) -> dict[str, Any]:
        saved = save_model(whole, self.folder / "model", self.around.corpus.tokenizer)
        described: dict[str, Any] = {"layout": saved.layout}
        if witness is not None:
            specialisation, routing = witness.result()
            write_json(self.folder / "specialisation.json", specialisation)
            described |= routing
        result = self._facts(evaluation) | described
        write_json(self.folder / "result.json", result)
        self.checkpoints.finish()
        return result

    def _facts(self, evaluation: Evaluation) -> dict[str, Any]:
        around, counts = self.around, self.counts
        recipe = around.recipe
        return {
            "name": self.name,
            "method": self.model.config["method"],
            "validation_bits_per_byte": evaluation.bits_per_byte,
            "validation_loss": evaluation.loss,
            "validation_accuracy": evaluation.accuracy,
            "validation_bytes": evaluation.num_bytes,
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in self.metrics.records),
            "active_parameters": counts.active,
            "total_parameters": counts.total,
            "seconds": round(self._elapsed(), 1),
            "steps": self.step,
            "tokens": self.step * self._tokens_per_step,
            "seed": recipe.seed,
            "device": str(around.machine.device),
            "precision": around.machine.precision_name,
            "threads": around.machine.threads,
            "mesh": around.mesh_words,
            "corpus": around.corpus.fingerprint,
            "versions": versions(),
            "goodput": self.goodput.summary(self._elapsed() + self.goodput.seconds["lost"]),
        }

    @property
    def _tokens_per_step(self) -> int:
        return self.settings.batch_size * self.around.recipe.data.sequence_length

    def _save_or_say(self) -> None:
        """A checkpoint on the way; where the disk refuses, the run goes on with the ones before."""
        try:
            self._save()
        except OSError as error:
            self.around.progress.say(f"step {self.step} could not be saved: {error}; the run goes on without it")

    def _save(self) -> None:
        with self.goodput.spent("checkpoint"):
            best = [record["bits_per_byte"] for record in self.evaluations.records]
            state = capture(
                self.model,
                self.optimiser,
                self.step,
                self._elapsed(),
                self.around.fingerprint,
                spent=self.goodput.seconds,
                bits_per_byte=best[-1] if best else None,
                part=self.part,
            )
            self.checkpoints.save(state, self.around.team)
            self._saved_step = self.step

    def _elapsed(self) -> float:
        """Seconds spent on this model, also before it was stopped."""
        return self.seconds + time.monotonic() - self._started

    @contextmanager
    def _files(self) -> Iterator[None]:
        names = ["metrics", "evaluations", "events", *(["routing"] if self.log else [])]
        with ExitStack() as stack:
            for name in names:
                file = JsonLines(self.folder / f"{name}.jsonl", self.step, writes=self.around.team.first)
                setattr(self, name, stack.enter_context(file))
            yield


def checkpoints_of(folder: Path, settings: TrainSection) -> Checkpoints:
    """The checkpoints of the model whose files are in `folder`."""
    return Checkpoints(folder / "checkpoint", settings.keep_last, settings.keep_best, settings.keep_every)


def compile_around_experts(model: DecoderLM) -> Any:
    """The model compiled except for its MoE layers: how many rows an expert gets is known only as it runs."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    return torch.compile(model)


def stream(seed: int, step: int, process: int) -> int:
    """The seed of what a process draws in a step."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{process}".encode()) >> 1


def seed_everything(seed: int) -> None:
    """Seed every generator that a method might draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
