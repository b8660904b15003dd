"""Watching a transformers model: its routing as Decisions, exact balance losses, a selection bias that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.balance import LoadTimesProbability, z_loss
from moestro.balance.counts import chosen_load
from moestro.balance.losses import Convention
from moestro.balance.totals import Layers, StepTotals, Term, terms_of
from moestro.hf.bias import check_bias, update_bias
from moestro.hf.decisions import Heard, OfShares
from moestro.hf.families import FoundLayer, find_layers
from moestro.hf.tokens import CallReader, recomputing
from moestro.hf.traces import Trace, new_folder
from moestro.hf.tracewriter import TraceWriter
from moestro.routing import Decision


def watch(model: nn.Module, **settings: Any) -> TransformersLog:
    """Attach a log to a transformers MoE model; see `TransformersLog` for the settings."""
    return TransformersLog(model, **settings)


class TransformersLog:
    """Collects the decisions of every mixture layer of a transformers model, from outside.

        log = moestro.watch(model)
        with log.recording():
            loss = model(**batch).loss
        (loss + 0.01 * log.auxiliary_loss(convention="megatron")).backward()
        optimizer.step()
        log.update_bias()                               # with bias_rate, for families that carry a bias

    It speaks like `moestro.RoutingLog`. Losses are per layer and of this recording's valid tokens; for the loss of
    a whole optimiser step, however it is split into micro-batches and ranks, look at them twice:

        totals = log.first_pass(partial(model, **batch) for batch in micro_batches)     # without gradient
        for batch in micro_batches:
            with log.recording():
                loss = model(**batch).loss / len(micro_batches)
            (loss + 0.01 * log.auxiliary_loss(totals=totals)).backward()

    Nothing is computed while the model runs and nothing is recorded while activations are recomputed, so
    checkpointing (not the reentrant kind) and compilation of other parts do not disturb it.

    Args:
        model: of transformers, or a wrapper that takes the same arguments.
        convention: of the balance loss unless `auxiliary_loss` says otherwise, see `LoadTimesProbability`.
        z_loss: coefficient of the router z-loss beside the balance loss, which counts 1.
        layers: how layers come together: their `mean` (so that `transformers` coefficients keep their strength),
            their `sum` (as papers and Megatron have it), or `pooled` as transformers itself does.
        bias_rate: step of the selection bias at `update_bias`; None = leave it alone.
        group: ranks whose loads are added for the bias; None = all, if torch.distributed runs.

    Raises:
        ValueError: no mixture layer; a bias rate for a family without a bias, or with one that loses its updates.

    Attributes:
        layers: names of the mixture layers in model order.
        found: each layer's family, router, experts and bias by name.
        bias_rate: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        convention: Convention = "switch",
        z_loss: float = 0.0,
        layers: Layers = "mean",
        bias_rate: float | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.found: dict[str, FoundLayer] = find_layers(model)
        self.layers = list(self.found)
        self._losses(convention, z_loss)
        terms_of({}, {}, layers)  # refuses another word
        self._convention, self._z_loss, self._together = convention, z_loss, layers
        self.bias_rate, self._group = bias_rate, group
        if bias_rate is not None:
            for layer in self.found.values():
                check_bias(layer)
        self.model = model
        self._reader = CallReader(model)
        self._heard: dict[str, list[Heard]] = {name: [] for name in self.layers}
        self._decisions: dict[str, list[Decision]] | None = None
        self._load: dict[str, Tensor] = {}
        self._writer: TraceWriter | None = None
        self._open = self._recorded = self._lost_gradient = False
        self._measuring = True
        self._hooks = [layer.router.register_forward_hook(Ear(self, layer)) for layer in self.found.values()]

    @contextmanager
    def recording(self, valid: Tensor | None = None) -> Iterator[TransformersLog]:
        """Record what routers decide inside the block; forgets the recording before.

        Calls without gradient beside calls with one, as some trainers make for their statistics, are left out.

        Args:
            valid: tokens that are not padding, `[batch, length]`, instead of what the attention mask says.
        """
        self._heard, self._decisions = {name: [] for name in self.layers}, None
        self._open = self._recorded = True
        self._lost_gradient = False
        self._reader.override = valid
        try:
            yield self
        finally:
            self._open, self._reader.override = False, None
            self._heard = {name: _of_the_loss(heard) for name, heard in self._heard.items()}
            self._measure()

    @contextmanager
    def record(self, folder: str | Path | None = None) -> Iterator[Trace]:
        """Write down every choice inside the block, for `moestro.replay` and for looking at.

        Args:
            folder: stream to this new folder as the model runs; None = keep it in memory (`trace.save` writes it).

        Raises:
            ValueError: a folder that exists already.
        """
        final = None if folder is None else Path(folder)
        with ExitStack() as stack:
            draft = None if final is None else stack.enter_context(new_folder(final))
            self._writer = writer = TraceWriter(self.model, self.found, draft, final)
            try:
                yield writer.trace
                writer.finish()
            finally:
                self._writer = None

    @property
    def decisions(self) -> Mapping[str, list[Decision]]:
        """Decisions of the last recording by layer name, one per call.

        Raises:
            ValueError: nothing was recorded, or a mask that does not fit the tokens.
        """
        if not self._recorded:
            raise ValueError("nothing was recorded; run the model inside `with log.recording():` first")
        if self._decisions is None:
            with torch.enable_grad():  # whoever looks first, a loss that is asked for later needs the graph
                self._decisions = {name: [each.decision() for each in heard] for name, heard in self._heard.items()}
        return self._decisions

    def auxiliary_loss(
        self,
        totals: StepTotals | None = None,
        *,
        convention: Convention | None = None,
        layers: Layers | None = None,
    ) -> Tensor:
        """The balance loss (plus z-loss) of the recording, a scalar with a gradient; 0 if all tokens are padding.

            mean over layers of  E * sum_e f_e P_e  +  z_loss * mean_t logsumexp(logits_t)^2

        Args:
            totals: of the step that this recording is a part of, from `first_pass`; then this is the part's share,
                and the shares of all micro-batches add up to the loss of the step.
            convention: instead of the log's own; with totals, the one that they were made with.
            layers: instead of the log's own.

        Raises:
            ValueError: nothing was recorded, or the routers ran without a gradient though the model was called
                with one.
        """
        self._check_gradient()
        terms = self._terms(convention, layers)
        values = [term.coefficient * term.value(totals)[0] for term in terms if term.coefficient]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def losses(
        self, totals: StepTotals | None = None, *, convention: Convention | None = None
    ) -> dict[str, Tensor]:
        """Each loss without its coefficient and without gradient, averaged over layers and calls.

        Args:
            totals: see `auxiliary_loss`; then the losses are those of the whole step.
            convention: instead of the log's own.

        Raises:
            ValueError: nothing was recorded.
        """
        by_title: dict[str, list[Tensor]] = {}
        for term in self._terms(convention, None):
            by_title.setdefault(term.title, []).append(term.value(totals)[1])
        return {title: torch.stack(values).mean() for title, values in by_title.items()}

    def layer_losses(self, convention: Convention | None = None) -> dict[str, float]:
        """The balance loss of each layer by name, averaged over its calls; a collapsed layer stands out."""
        values: dict[str, list[float]] = {}
        for term in self._terms(convention, "mean"):
            if term.title == "balance":
                values.setdefault(term.place, []).append(float(term.value()[1]))
        return {name: sum(each) / len(each) for name, each in values.items()}

    def first_pass(
        self,
        passes: Iterable[Callable[[], object]],
        *,
        convention: Convention | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> StepTotals:
        """The sums of the losses over a whole optimiser step, for `auxiliary_loss(totals)`.

        Every pass runs without gradient; random numbers are afterwards as before, so that the same passes with
        gradient decide the same. That costs one more forward pass, about a third of a training step.

        Args:
            passes: run the model on one micro-batch each, in the order of the second pass.
            convention: instead of the log's own.
            group: ranks whose tokens count too; None = all, if torch.distributed runs.
        """
        totals = StepTotals()
        self._measuring = False
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            for run in passes:
                with self.recording():
                    run()
                totals.add(self._terms(convention, None))
        totals.reduce(group)
        self._measuring, self._recorded = True, False
        return totals

    def update_bias(self) -> None:
        """Move the selection biases by what was recorded in training mode since the last call.

        Call it once per optimiser step, after `optimizer.step()`.

        Raises:
            ValueError: a log without a bias rate.
        """
        if self.bias_rate is None:
            raise ValueError("this log has no bias_rate; pass moestro.watch(model, bias_rate=0.001)")
        for name, load in self._load.items():
            update_bias(self.found[name], load, self.bias_rate, self._group)
        self._load = {}

    def update_controllers(self) -> None:
        """What `RoutingLog` calls it: `update_bias` if there is a bias rate."""
        if self.bias_rate is not None:
            self.update_bias()

    def describe(self) -> list[str]:
        """One line per family of layers: what is watched, and which loss and bias act."""
        bias = "" if self.bias_rate is None else f", bias rate {self.bias_rate:g}"
        text = f"{self._convention} balance loss, {self._together} of layers, z-loss x {self._z_loss:g}{bias}"
        kinds = {layer.family.name for layer in self.found.values()}
        return [
            f"{kind}: {text} ({len(self.layers)} layers: {self.layers[0]} to {self.layers[-1]})" for kind in kinds
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        self._reader.close()
        for hook in self._hooks:
            hook.remove()

    def hear(self, layer: FoundLayer, output: Any, training: bool) -> None:
        """What the hook on a layer's router calls with its answer."""
        if recomputing() or not (self._open or self._writer):
            return
        bias = None if layer.bias is None else layer.bias.detach().flatten().clone()
        heard = Heard(layer, output, self._reader.of_layer(layer.name), bias, training, self._reader.gradient)
        if self._writer is not None:
            self._writer.add(heard)
        if self._open:
            self._heard[layer.name].append(heard)
            self._lost_gradient |= self._reader.gradient and not torch.is_grad_enabled()

    @torch.no_grad()
    def _measure(self) -> None:
        if self.bias_rate is None or not self._measuring:
            return
        for name, heard in self._heard.items():
            for each, decision in zip(heard, self.decisions[name], strict=True):
                if each.training:
                    load = chosen_load(decision)
                    self._load[name] = self._load[name] + load if name in self._load else load

    def _terms(self, convention: Convention | None, layers: Layers | None) -> list[Term]:
        losses = self._losses(convention or self._convention, self._z_loss)
        return terms_of(self.decisions, dict.fromkeys(self.layers, losses), layers or self._together)

    @staticmethod
    def _losses(convention: Convention, z: float) -> dict[str, tuple[float, Callable[[Decision], Tensor]]]:
        losses: dict[str, tuple[float, Callable[[Decision], Tensor]]] = {
            "balance": (1.0, OfShares(LoadTimesProbability(convention)))
        }
        return losses | ({"z": (z, z_loss)} if z else {})

    def _check_gradient(self) -> None:
        if self._lost_gradient and torch.is_grad_enabled():
            raise ValueError(
                "the routers ran without a gradient though the model was called with one, so a balance loss could "
                "not train them: reentrant activation checkpointing does that; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _of_the_loss(heard: list[Heard]) -> list[Heard]:
    """The calls that a loss can be made of; all of them where none has a gradient."""
    return [each for each in heard if each.gradient] or heard


@dataclass(frozen=True, eq=False)
class Ear:
    """The hook on one router.

    Attributes:
        log: that listens.
        layer: whose router it is.
    """

    log: TransformersLog
    layer: FoundLayer

    def __call__(self, router: nn.Module, arguments: Any, output: Any) -> None:
        self.log.hear(self.layer, output, router.training)


def logs_of(layer: FoundLayer) -> list[TransformersLog]:
    """The logs that watch a layer now."""
    return [hook.log for hook in layer.router._forward_hooks.values() if isinstance(hook, Ear)]


def convert_coefficient(coefficient: float, source: Convention, target: Convention, top_k: int) -> float:
    """The coefficient that gives the same balance loss in another convention.

        transformers = k * megatron;   switch counts first choices only: another function unless k = 1

    Args:
        coefficient: in the convention `source`, for the same handling of layers.
        source: `switch`, `megatron` or `transformers`.
        target: one of these.
        top_k: experts per token.

    Raises:
        ValueError: an unknown convention, or `switch` on one side with more than one expert per token.
    """
    LoadTimesProbability(source), LoadTimesProbability(target)
    if source == target or top_k == 1:
        return coefficient
    if "switch" in (source, target):
        raise ValueError(
            f"the switch convention counts first choices only, so with top_k={top_k} no coefficient makes "
            f"{source} equal to {target}; keep one convention, or convert between megatron and transformers"
        )
    return coefficient / top_k if target == "transformers" else coefficient * top_k
