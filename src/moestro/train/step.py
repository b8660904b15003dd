"""One optimiser step of a language model: forward, auxiliary losses, backward, clip, update, controllers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from moestro.balance import RoutingLog, StepTotals
from moestro.data import Batch
from moestro.experts import accumulate_in_place
from moestro.routing import Decision
from moestro.train.culprit import Culprit, Watch, bad_gradient, bad_loss, bad_state, bad_weight
from moestro.train.errors import NonFiniteLoss
from moestro.train.exchange import Exchange, NoExchange
from moestro.train.machine import Machine
from moestro.train.objectives import Objective, objective_for
from moestro.train.optimiser import clipped_step
from moestro.train.sound import Soundness

Statistics = Literal["micro-batch", "step"]


@dataclass(frozen=True)
class StepResult:
    """What one step measured: mean loss of a token in nats, the weighted auxiliary loss, the gradient norm
    before clipping, and each auxiliary loss without its coefficient."""

    loss: float
    auxiliary_loss: float
    grad_norm: float
    named: dict[str, float] = field(default_factory=dict)


def _bad_figure(loss: float, auxiliary: float) -> str:
    if not math.isfinite(auxiliary):
        return f"the auxiliary loss is {auxiliary}"
    return f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"


class Stepper:
    """Takes optimiser steps.

    A batch is split into `accumulate` micro-batches. Each token weighs the same however it is split: losses are
    summed over tokens and divided by the tokens of the whole batch. An auxiliary loss is that of each micro-batch,
    weighed by its tokens, or with `statistics="step"` that of all tokens of the batch, exactly; the latter runs the
    micro-batches once more without gradient (`RoutingLog.first_pass`), unless there is one only.

    Args:
        model: tokens and, by keyword, domain, both `[batch, length]` -> logits.
        optimiser: of the model's parameters.
        machine: device and precision.
        log: of the model's MoE layers; None for a dense model.
        accumulate: micro-batches in a batch; with more than one, see `accumulate_in_place`.
        clip: largest gradient norm; 0 = no clipping.
        compiled: what to call in place of the model, for example `torch.compile(model)`.
        statistics: whose tokens an auxiliary loss is computed from, "micro-batch" or "step".
        objective: what is learned; None = what the model's routers need, mostly the next token.
        exchange: what processes with a share of the batch each need of each other; None = this one has it all.
        check_every: steps in which each weight is looked at once, see `Soundness`; 0 = never, nor the optimiser's
            state. Loss and gradient are looked at every step.

    Attributes:
        sound: looks for bad numbers in weights and optimiser state.
        random_state: of torch's generator when the last step began.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        machine: Machine,
        log: RoutingLog | None = None,
        *,
        accumulate: int = 1,
        clip: float = 1.0,
        compiled: Callable[..., Tensor] | None = None,
        statistics: Statistics = "micro-batch",
        objective: Objective | None = None,
        exchange: Exchange | None = None,
        check_every: int = 1,
    ):
        self.model, self.optimiser, self.machine, self.log = model, optimiser, machine, log
        self.accumulate, self.clip, self.statistics = accumulate, clip, statistics
        self.objective = objective or objective_for(model)
        self.exchange = exchange or NoExchange()
        self.random_state = torch.get_rng_state()
        self.sound = Soundness(model, optimiser, check_every)
        self._forward: Callable[..., Tensor] = model if compiled is None else compiled
        if accumulate > 1:
            accumulate_in_place(model)

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """Learn from one batch; raises NonFiniteLoss, naming `step`, before a bad gradient reaches the weights."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        self.random_state = torch.get_rng_state()
        totals = self._totals(batch)
        parts = [self._backward(*part, totals) for part in self._parts(batch)]
        self.exchange.gradients(self.model)
        total = self._added_up(parts)
        loss, auxiliary = total.pop("loss"), total.pop("auxiliary_loss")
        grad_norm = float(self.exchange.norm(self.model))
        if not all(map(math.isfinite, (loss, auxiliary, grad_norm))):
            raise self._failure(batch, step, _bad_figure(loss, auxiliary))
        if self.sound.every and not self.exchange.all_true(self.sound(step)):
            raise self._failure(batch, step, "a weight or the optimiser's state is not finite")
        clipped_step(self.optimiser, self.model.parameters(), grad_norm, self.clip)
        self.exchange.settle(self.model)
        if self.log is not None:
            self.log.update_controllers()
        return StepResult(loss, auxiliary, grad_norm, total)

    def _added_up(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """What the micro-batches measured, together and over all processes."""
        sums = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in parts[0]])
        return dict(zip(parts[0], self.exchange.summed(sums).tolist(), strict=True))

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """Tokens, their domains, targets and the weight of one token's loss, for each micro-batch."""
        pieces = [
            facts.to(self.machine.device).chunk(self.accumulate)
            for facts in (batch.tokens, batch.domain.long(), batch.targets)
        ]
        for tokens, domain, targets in zip(*pieces, strict=True):
            yield tokens, domain, targets, 1 / (batch.targets.numel() * self.exchange.processes)

    def _totals(self, batch: Batch) -> StepTotals | None:
        if self.log is None or self.statistics == "micro-batch" or self.accumulate == 1:
            return None
        return self.exchange.first_pass(self.log, [partial(self._infer, *part[:2]) for part in self._parts(batch)])

    def _infer(self, tokens: Tensor, domain: Tensor) -> list[Tensor]:
        """Logits `[tokens, classes]` of each pass that the objective wants."""
        with self.machine.autocast():
            passes = [self._forward(tokens, domain=domain) for _ in range(self.objective.passes)]
        return [_wide(logits).flatten(0, 1) for logits in passes]

    def _backward(
        self, tokens: Tensor, domain: Tensor, targets: Tensor, weight: float, totals: StepTotals | None
    ) -> dict[str, Tensor]:
        mine = tokens.numel() * weight
        share = mine * self.exchange.processes
        with nullcontext() if self.log is None else self.log.recording():
            logits = self._infer(tokens, domain)
        if self.log is None:
            auxiliary, named, decisions = logits[0].new_zeros(()), dict[str, Tensor](), list[Decision]()
        else:
            counted = totals or self.exchange.totals(self.log)
            auxiliary, named = self.log.auxiliary_loss(counted), self.log.losses(counted)
            auxiliary = auxiliary * share if totals is None else auxiliary
            decisions = list(chain(*self.log.decisions.values()))
        measured_loss, learned = self.objective(logits, targets.flatten(), decisions)
        (learned * weight + auxiliary).backward()
        measured = {"loss": measured_loss * weight, "auxiliary_loss": auxiliary.detach().float()}
        return measured | {name: value * mine for name, value in named.items()}

    def _failure(self, batch: Batch, step: int, what: str) -> NonFiniteLoss:
        """The error that names the first bad number, found by running the batch once more."""
        earliest = self.exchange.earliest
        seen = bad_gradient(self.model)
        before = earliest(bad_weight(self.model, self.sound.buffers()) or bad_state(self.model, self.optimiser))
        culprit = before or self._again(batch) or earliest(seen)
        where = str(culprit) if culprit else "nothing when run again: a fault that passed"
        kind, name = (culprit.kind, culprit.name) if culprit else ("", "")
        self.model.zero_grad(set_to_none=True)
        if self.log is not None:
            self.log.discard()
        return NonFiniteLoss(f"{what} at step {step} (first in {where}); {_ADVICE}", step, kind, name)

    def _again(self, batch: Batch) -> Culprit | None:
        """Run the batch as before, watched from inside; random states, buffers and weights stay as they are."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        after, self._forward = self._forward, self.model
        try:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.random_state)
                return self._watched(batch)
        finally:
            self._forward = after
            for buffer, kept in buffers:
                buffer.copy_(kept)

    def _watched(self, batch: Batch) -> Culprit | None:
        self.model.zero_grad(set_to_none=True)
        for part in self._parts(batch):
            with Watch(self.model) as watch:
                measured = self._backward(*part, None)
            found = watch.forward
            if found is None and self.log is not None and not measured["auxiliary_loss"].isfinite():
                found = bad_loss(self.log.values_by_layer())
            first = self.exchange.earliest(found or watch.backward)
            if first is not None:
                return first
        return None


def _wide(value: Tensor) -> Tensor:
    """float32 at least."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


_ADVICE = "lower train.learning_rate, lengthen train.warmup_fraction or use train.precision float32"
