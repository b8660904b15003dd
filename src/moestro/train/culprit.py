"""Which module made a number infinite or NaN: the same batch again, watched from inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro.experts import Experts
from moestro.experts.parallel import ParallelExperts
from moestro.parallel.gradients import here
from moestro.routing import Decision


@dataclass(frozen=True)
class Culprit:
    """Where the first bad number was.

    Attributes:
        kind: "weight", "optimiser state", "input", "output", "auxiliary loss" or "gradient".
        name: of the module, parameter or loss; one expert of a bank is `layers.7.moe.experts[13].down`.
        at: calls of modules before it in the run that was watched.
        rank: the process that found it, if not all did.
    """

    kind: str
    name: str
    at: int = 0
    rank: int | None = None

    def __str__(self) -> str:
        where = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.kind} of {self.name}{where}"

    @property
    def order(self) -> tuple[int, int]:
        """Earlier culprits are lower, if found by processes that do the same."""
        return _STAGES.index(self.kind), self.at

    def facts(self) -> tuple[str, str, int]:
        """What another process needs to know of it."""
        return self.kind, self.name, self.at


_STAGES = ("weight", "optimiser state", "input", "output", "auxiliary loss", "gradient")


def bad_weight(model: nn.Module, buffers: Mapping[str, Tensor]) -> Culprit | None:
    """The first parameter, or of these buffers, that is not finite."""
    tensors = {**dict(model.named_parameters()), **buffers}
    return next((Culprit("weight", tensor_name(model, name, tensor)) for name, tensor in _bad(tensors)), None)


def bad_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> Culprit | None:
    """The first parameter whose optimiser state is not finite."""
    for name, parameter in model.named_parameters():
        state = {key: value for key, value in optimiser.state.get(parameter, {}).items() if torch.is_tensor(value)}
        for key, value in _bad(state):
            return Culprit("optimiser state", f"{tensor_name(model, name, value)}, {key}")
    return None


def bad_gradient(model: nn.Module) -> Culprit | None:
    """The first parameter whose gradient is not finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return next((Culprit("gradient", tensor_name(model, name, grad)) for name, grad in _bad(gradients)), None)


class Watch:
    """Hooks on every module that note the first bad input, output or gradient while they are there.

        with Watch(model) as watch:
            loss = objective(model(batch)); loss.backward()
        watch.forward, watch.backward           Culprit or None

    Forwards, the first module that was given a bad number or made one is the culprit; children end before their
    parent, so the innermost is named. Backwards, it is the module that got finite gradients for its output and gave
    a bad one for its input, or whose parameter's gradient is bad.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.forward: Culprit | None = None
        self.backward: Culprit | None = None
        self._handles: list[Any] = []
        self._producer: dict[int, str] = {}
        self._consumers: dict[int, list[str]] = {}
        self._tensors: list[Tensor] = []  # kept alive, or their ids would name others
        self._answered: set[str] = set()  # modules whose output got a finite gradient
        self._calls = 0

    def __enter__(self) -> Watch:
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name)),
            ]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._of_parameter(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._tensors = [], []

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, keywords: Any) -> None:
            tensors = _tensors((arguments, keywords))
            self._calls += 1
            if self.forward is None and any(_bad(tensors)):
                self.forward = Culprit("input", name or "the model", self._calls)
            for tensor in tensors.values():
                self._follow(tensor)
                self._consumers.setdefault(id(tensor), []).append(name)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = _tensors(output)
            self._calls += 1
            if self.forward is None and any(_bad(tensors)):
                self.forward = Culprit("output", name or "the model", self._calls)
            for tensor in tensors.values():
                self._follow(tensor)
                self._producer.setdefault(id(tensor), name)

        return hook

    def _follow(self, tensor: Tensor) -> None:
        if tensor.grad_fn is not None and id(tensor) not in self._consumers | self._producer:
            self._tensors.append(tensor)
            self._handles.append(tensor.register_hook(self._of_tensor(id(tensor))))

    def _of_tensor(self, key: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if _finite(gradient):
                self._answered.add(self._producer.get(key, ""))
            elif self.backward is None:
                consumers = [name for name in self._consumers.get(key, []) if name in self._answered]
                name = _innermost(consumers) or self._producer.get(key, "")
                self.backward = Culprit("gradient", name or "the logits")

        return hook

    def _of_parameter(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.backward is None and not _finite(gradient):
                self.backward = Culprit("gradient", tensor_name(self.model, name, gradient))

        return hook


def _innermost(names: list[str]) -> str | None:
    """Of modules that share an input: the one inside all others, or the parent where several children do."""
    if not names:
        return None
    outer = min(names, key=len)
    inner = [name for name in names if name != outer]
    return inner[0] if len(inner) == 1 else outer


def bad_loss(values: Mapping[str, Iterable[Tensor]]) -> Culprit | None:
    """The first auxiliary loss that is not finite; values by `layer: loss`."""
    for name, each in values.items():
        if not all(map(_finite, each)):
            return Culprit("auxiliary loss", name)
    return None


def tensor_name(model: nn.Module, name: str, tensor: Tensor) -> str:
    """A parameter's name, with the first bad expert of a stacked one: `layers.7.moe.experts[13].down`."""
    owner, _, leaf = name.rpartition(".")
    bank = model.get_submodule(owner) if owner else model
    if isinstance(bank, Experts) and tensor.ndim > 1 and len(tensor) == bank.num_experts:
        place = next(index for index, part in enumerate(tensor) if not _finite(part))
        whole, _, local = owner.rpartition(".")
        around = model.get_submodule(whole) if whole else model
        if local == "local" and isinstance(around, ParallelExperts):  # by its number in the model, not here
            here = around.network.mesh.experts.get_local_rank("expert")
            return f"{whole}[{around.placement.experts_of(here)[place]}].{leaf}"
        return f"{owner}[{place}].{leaf}"
    return name


def _tensors(value: Any) -> dict[str, Tensor]:
    """The floating-point tensors in a module's input or output."""
    return {str(index): tensor for index, tensor in enumerate(_walk(value)) if tensor.is_floating_point()}


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Decision):  # -inf marks experts that are ruled out, so only NaN is bad in a logit
        logits = value.logits
        yield from () if logits is None else (logits.masked_fill(logits.isneginf(), 0),)
        yield from () if value.probs is None else (value.probs,)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _walk(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _walk(each)


def _bad(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors.items() if not _finite(tensor))


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(here(tensor).isfinite().all())
