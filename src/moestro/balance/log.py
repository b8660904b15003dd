"""The one channel from routers to losses, controllers, statistics and reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

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
    not recorded. What controllers measure adds up over all recordings in training mode until
    `update_controllers`, so gradient accumulation needs no care.

    Args:
        model: any module that holds MoE layers; a layer shared by several places is recorded at each call.

    Raises:
        ValueError: a model without an MoE layer.

    Attributes:
        layers: names of the MoE layers in model order.
        decisions: decisions of the last recording by layer name, one per call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._moes = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        if not self._moes:
            raise ValueError("this model has no MoE layer to record; build one with moestro.build(...)")
        self.layers = list(self._moes)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.decisions: dict[str, list[Decision]] = {name: [] for name in self.layers}
        self._measured: dict[tuple[str, int], Tensor] = {}
        self._open = self._recorded = False
        self._computed: dict[str, list[tuple[float, Tensor]]] | None = None
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

    def auxiliary_loss(self) -> Tensor:
        """The sum over layers, calls and losses of `coefficient * loss(decision)`; 0 if no loss is on.

        Raises:
            ValueError: nothing was recorded.
        """
        terms = [coefficient * value for coefficient, value in chain(*self._values().values()) if coefficient]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self._device)

    def losses(self) -> dict[str, Tensor]:
        """Each named loss without its coefficient and without gradient, averaged over layers and calls.

        Raises:
            ValueError: nothing was recorded.
        """
        return {
            title: torch.stack([value.detach() for _, value in each]).mean()
            for title, each in self._values().items()
            if each
        }

    def attach(self, y: Tensor) -> Tensor:
        """`y` itself; backward through it also adds the gradient of `auxiliary_loss`.

        For pipelines, where the objective is computed on another rank. The auxiliary gradient is added once,
        unscaled, whatever the gradient of `y`.
        """
        attached: Tensor = _Attach.apply(y, self.auxiliary_loss())
        return attached

    def update_controllers(self) -> None:
        """Let controllers act on what they measured since the last call; call it after the optimiser step."""
        for (name, index), measured in self._measured.items():
            moe = self._moes[name]
            moe.controllers[index].update(moe, measured)
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
            for index, controller in enumerate(moe.controllers if router.training else ()):
                measured, key = controller.measure(decision), (name, index)
                self._measured[key] = self._measured[key] + measured if key in self._measured else measured

        return record

    def _values(self) -> dict[str, list[tuple[float, Tensor]]]:
        """Coefficient and value of each named loss per layer and call, computed once per recording.

        A loss whose coefficient is 0 is measured without gradient.
        """
        if not self._recorded:
            raise ValueError("nothing was recorded; run the model inside `with log.recording():` first")
        if self._computed is None:
            self._computed = {}
            for name, moe in self._moes.items():
                for title, (coefficient, loss) in moe.losses.items():
                    with torch.set_grad_enabled(torch.is_grad_enabled() and coefficient != 0):
                        values = [(coefficient, loss(decision)) for decision in self.decisions[name]]
                    self._computed.setdefault(title, []).extend(values)
        return self._computed


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.saved_tensors[0]
