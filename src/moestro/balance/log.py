"""The one channel from routers to losses, controllers, statistics and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.balance.totals import Layers, StepTotals, Term, terms_of
from moestro.layers import MoE
from moestro.routing import Decision


class RoutingLog:
    """Collects the decisions of every MoE layer of a model, from outside, by one forward hook per router.

        log = RoutingLog(model)
        with log.recording():
            loss = objective(model(batch))
        (loss + log.auxiliary_loss()).backward()
        optimizer.step()
        log.update_controllers()

    Close `recording()` before `backward`: activation checkpointing runs routers again, and what runs outside is
    not recorded. What controllers measure is joined over all recordings in training mode until
    `update_controllers`, so gradient accumulation needs no care there.

    Auxiliary losses are of the tokens of one recording, as in most code. For the loss of a whole optimiser step,
    however it is split into micro-batches and ranks, look at them twice:

        totals = log.first_pass(partial(model, batch) for batch in micro_batches)       # without gradient
        for batch in micro_batches:
            with log.recording():
                loss = objective(model(batch))
            (loss + log.auxiliary_loss(totals)).backward()        # adds up to the gradient of one big batch

    Args:
        model: any module that holds MoE layers; a layer shared by several places is recorded at each call.
        layers: how the losses of layers come together: their `sum` (as papers have it), their `mean`, or `pooled`,
            one loss of all layers' tokens (as transformers has it; all calls count together).

    Raises:
        ValueError: a model without an MoE layer.

    Attributes:
        layers: names of the MoE layers in model order.
        decisions: decisions of the last recording by layer name, one per call.
    """

    def __init__(self, model: nn.Module, layers: Layers = "sum") -> None:
        self._moes = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        if not self._moes:
            raise ValueError("this model has no MoE layer to record; build one with moestro.build(...)")
        self.layers = list(self._moes)
        self._together = layers
        terms_of({}, {}, layers)  # refuses another word
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.decisions: dict[str, list[Decision]] = {name: [] for name in self.layers}
        self._measured: dict[tuple[str, int], Tensor] = {}
        self._open = self._recorded = False
        self._measuring = True
        self._computed: tuple[StepTotals | None, list[tuple[Term, Tensor, Tensor]]] | None = None
        self._hooks = [moe.router.register_forward_hook(self._hook(name, moe)) for name, moe in self._moes.items()]

    @contextmanager
    def recording(self) -> Iterator[RoutingLog]:
        """Record what routers decide inside the block; forgets the recording before."""
        self.decisions = {name: [] for name in self.layers}
        self._open = self._recorded = True
        self._computed = None
        try:
            yield self
        finally:
            self._open = False

    def first_pass(
        self, passes: Iterable[Callable[[], object]], group: dist.ProcessGroup | None = None
    ) -> StepTotals:
        """The sums of the auxiliary losses over a whole optimiser step.

        Every pass runs without gradient; controllers measure nothing, and random numbers and the state of routers
        are afterwards as before, so that the same passes with gradient decide the same. That costs one more
        forward pass (about a third of a training step).

        Args:
            passes: run the model on one micro-batch each, in the order of the second pass.
            group: ranks whose tokens count too; None = all, if torch.distributed runs.

        Raises:
            ValueError: a loss that is no `moestro.balance.Loss`, hence cannot be added up.
        """
        totals = StepTotals()
        with torch.no_grad(), self._as_before(), torch.random.fork_rng(self._generators()):
            for run in passes:
                with self.recording():
                    run()
                totals.add(self._terms())
        totals.reduce(group)
        self._recorded, self._computed = False, None
        return totals

    def totals(self, group: dist.ProcessGroup | None = None) -> StepTotals:
        """The sums of the auxiliary losses of the last recording over ranks that recorded at the same time.

        With them each rank has its share of the loss of all their tokens, without a pass more; see `first_pass`.

        Args:
            group: ranks whose tokens count too; None = all, if torch.distributed runs.

        Raises:
            ValueError: nothing was recorded, or a loss that is no `moestro.balance.Loss`.
        """
        if not self._recorded:
            raise ValueError(_UNRECORDED)
        totals = StepTotals()
        totals.add(self._terms())
        totals.reduce(group)
        return totals

    def auxiliary_loss(self, totals: StepTotals | None = None) -> Tensor:
        """The sum over layers, calls and losses of `coefficient * loss(decision)`; 0 if no loss is on.

        Args:
            totals: of the step that this recording is a part of, from `first_pass`; then this is the part's share,
                and the shares of all micro-batches add up to the loss of the step.

        Raises:
            ValueError: nothing was recorded.
        """
        terms = [term.coefficient * value for term, value, _ in self._values(totals) if term.coefficient]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self._device)

    def losses(self, totals: StepTotals | None = None) -> dict[str, Tensor]:
        """Each named loss without its coefficient and without gradient, averaged over layers and calls.

        Args:
            totals: see `auxiliary_loss`; then the losses are those of the whole step.

        Raises:
            ValueError: nothing was recorded.
        """
        by_title: dict[str, list[Tensor]] = {}
        for term, _, value in self._values(totals):
            by_title.setdefault(term.title, []).append(value)
        return {title: torch.stack(values).mean() for title, values in by_title.items()}

    def values_by_layer(self) -> dict[str, list[Tensor]]:
        """Each loss of the last recording, without coefficient and gradient, by `layer: loss`, one per call."""
        found: dict[str, list[Tensor]] = {}
        for term, _, value in self._values(None):
            found.setdefault(f"{term.place}: {term.title}", []).append(value)
        return found

    def attach(self, y: Tensor, totals: StepTotals | None = None) -> Tensor:
        """`y` itself; backward through it also adds the gradient of `auxiliary_loss`.

        For pipelines, where the objective is computed on another rank. The auxiliary gradient is added once,
        unscaled, whatever the gradient of `y`.
        """
        attached: Tensor = _Attach.apply(y, self.auxiliary_loss(totals))
        return attached

    def update_controllers(self) -> None:
        """Let controllers act on what they measured since the last call; call it after the optimiser step."""
        for (name, index), measured in self._measured.items():
            moe = self._moes[name]
            moe.controllers[index].update(moe, measured)
        self._measured = {}

    def discard(self) -> None:
        """Forget what controllers measured since their last update: of a step that is not taken."""
        self._measured = {}

    def describe(self) -> list[str]:
        """One line per kind of layer: which losses and controllers act, with which coefficients."""
        lines: dict[str, list[str]] = {}
        for name, moe in self._moes.items():
            parts = [
                f"{title} loss x {coefficient:g}" if coefficient else f"{title} loss off"
                for title, (coefficient, _) in moe.losses.items()
            ]
            parts += [repr(controller) for controller in moe.controllers]
            text = f"{moe.method or 'MoE'}: {', '.join(parts) or 'no balancing'}"
            lines.setdefault(text, []).append(name)
        return [f"{text} ({len(names)} layers: {names[0]} to {names[-1]})" for text, names in lines.items()]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str, moe: MoE) -> Any:
        def record(router: nn.Module, arguments: Any, decision: Decision) -> None:
            if not self._open:
                return
            self.decisions[name].append(decision)
            for index, controller in enumerate(moe.controllers if router.training and self._measuring else ()):
                measured, key = controller.measure(decision), (name, index)
                before = self._measured.get(key)
                self._measured[key] = measured if before is None else controller.join(before, measured)

        return record

    def _terms(self) -> list[Term]:
        return terms_of(self.decisions, {name: moe.losses for name, moe in self._moes.items()}, self._together)

    def _values(self, totals: StepTotals | None) -> list[tuple[Term, Tensor, Tensor]]:
        """Each term with what to differentiate and its value, computed once per recording."""
        if not self._recorded:
            raise ValueError(_UNRECORDED)
        if self._computed is None or self._computed[0] is not totals:
            self._computed = totals, [(term, *term.value(totals)) for term in self._terms()]
        return self._computed[1]

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Routers keep their state, and controllers look away."""
        buffers = [buffer for moe in self._moes.values() for buffer in moe.router.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        self._measuring = False
        try:
            yield
        finally:
            self._measuring = True
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)

    def _generators(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


_UNRECORDED = "nothing was recorded; run the model inside `with log.recording():` first"


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.saved_tensors[0]
