"""What is written down while a model learns: metrics, evaluations, routing and events, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moestro.train.files import JsonLines, read_lines
from moestro.train.learner import Learner
from moestro.train.spikes import spike
from moestro.train.step import StepResult

METRICS = "metrics.jsonl"


class Records:
    """The lines of a model's folder, from the step that it has done; closed at the end of the block.

    Args:
        folder: of the model's files.
        learner: what is written about.
    """

    def __init__(self, folder: Path, learner: Learner):
        self.learner, self.around = learner, learner.around
        self.metrics, self.evaluations, self.events = (
            self._file(folder / name) for name in (METRICS, "evaluations.jsonl", "events.jsonl")
        )
        self.routing = self._file(folder / "routing.jsonl") if learner.log is not None else None

    def _file(self, path: Path) -> JsonLines:
        return JsonLines(path, self.learner.step, writes=self.around.team.first)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._of_steps, self.events):
            file.close()

    @property
    def _of_steps(self) -> list[JsonLines]:
        return [file for file in (self.metrics, self.evaluations, self.routing) if file is not None]

    @property
    def bits_per_byte(self) -> float | None:
        """Of the last evaluation; None before the first."""
        return self.evaluations.records[-1]["bits_per_byte"] if self.evaluations.records else None

    def seconds_after(self, step: int) -> float:
        """How long the recorded steps after this one took."""
        return seconds_of(self.metrics.records, step, self.around.tokens_per_step)

    def rewind(self) -> None:
        """Forget what came after the step to which the model went back; events stay."""
        for file in self._of_steps:
            file.rewind(self.learner.step)

    def event(self, step: int, event: str, **facts: Any) -> None:
        self.events.append({"step": step, "event": event, **facts})

    def step(self, result: StepResult, learning_rate: float, speed: float) -> None:
        """Write down a step that was taken, and tell of it.

        Args:
            result: what it measured.
            learning_rate: that it was taken with.
            speed: tokens per second.
        """
        step, progress = self.learner.step, self.around.progress
        record = result.named | {
            "step": step,
            "loss": result.loss,
            "lr": learning_rate,
            "tokens_per_second": speed,
            "grad_norm": result.grad_norm,
            "auxiliary_loss": result.auxiliary_loss,
        }
        height = spike([record["loss"] for record in self.metrics.records], result.loss)
        if height is not None:
            progress.say(
                f"{self.learner.name}: the loss jumps to {result.loss:.4f} at step {step}, "
                f"{height:.0f} standard deviations above the last steps"
            )
            self.event(step, "loss spike", deviations=height)
        self.metrics.append(record)
        settings = self.around.recipe.train
        if step % settings.log_every == 0 or step == settings.steps:
            self._route(result.grad_norm)
        progress.step(record)

    def _route(self, grad_norm: float) -> None:
        if self.routing is None or self.learner.log is None:
            return
        routing = self.learner.part.routing_record(self.learner.step, self.learner.log)
        for layer in routing["layers"]:
            layer["router_grad_norm"] = self._router_gradient(layer["name"], grad_norm)
        self.routing.append(routing)
        self.around.progress.load({layer["name"]: layer["load"] for layer in routing["layers"]})

    def _router_gradient(self, layer: str, grad_norm: float) -> float | None:
        """Norm of a router's gradient before clipping; None if no parameter of it has one."""
        router = self.learner.model.get_submodule(f"{layer}.router")
        if all(p.grad is None for p in router.parameters()):
            return None
        clip = self.around.recipe.train.clip
        clipped = float(self.learner.part.exchange.dense_norm(list(router.parameters())))
        return clipped * (max(1.0, grad_norm / clip) if clip else 1.0)


def seconds_of(metrics: list[dict[str, Any]], after: int, tokens_per_step: int) -> float:
    """How long the steps after one took that are in a model's metrics."""
    return sum(tokens_per_step / each["tokens_per_second"] for each in metrics if each["step"] > after)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The steps that an earlier life of the run wrote down."""
    return read_lines(folder / METRICS)
