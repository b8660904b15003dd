"""One-line mends for what `moestro doctor` finds, each an explicit change of a model's behaviour in training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moestro.hf.families import FoundLayer, find_layers
from moestro.hf.outputs import Reading


def revive_routers(model: nn.Module) -> nn.Module:
    """Let top-1 routers with normalised weights learn: the weight becomes the chosen expert's own score.

        w = gate(logits)[chosen]        Fedus et al. 2021, eq. 2, instead of w / w = 1

    This scales the experts' outputs by a number below 1, so a trained model needs some steps to settle. Models with
    more than one expert per token stay as they are.

    Returns: the model.

    Raises:
        ValueError: a model without a mixture layer, or with no dead router.
    """
    dead = [layer for layer in find_layers(model).values() if is_dead(layer)]
    if not dead:
        raise ValueError("this model has no top-1 router with normalised weights; there is nothing to revive")
    for layer in dead:
        layer.router.register_forward_hook(OwnScore(layer), prepend=True)
    return model


class OwnScore:
    """A hook that puts the chosen expert's own score in the place of a weight that is always 1."""

    def __init__(self, layer: FoundLayer) -> None:
        self._layer = layer

    def __call__(self, router: nn.Module, arguments: Any, output: Any) -> Any:
        family = self._layer.family
        reading = family.output.read(router, output)
        weight = family.gate(reading.logits).gather(1, reading.index).to(reading.weight.dtype)
        return family.output.write(output, Reading(reading.logits, weight, reading.index, reading.keep))


def protect_inputs(model: nn.Module) -> nn.Module:
    """Give every mixture layer a copy of its input, so that jitter no longer changes the caller's tensor.

    Returns: the model.
    """
    for layer in find_layers(model).values():
        layer.block.register_forward_pre_hook(copy_input)
    return model


def copy_input(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook of `protect_inputs`: the same arguments with the hidden states copied, in training."""
    hidden, *others = arguments
    return (hidden.clone() if block.training and isinstance(hidden, Tensor) else hidden, *others)


def is_dead(layer: FoundLayer) -> bool:
    """Whether a router can learn nothing from the task: one expert per token whose weight is always 1."""
    family, router = layer.family, layer.router
    if family.weigh is None or getattr(router, "top_k", 0) != 1:
        return False
    revived = any(isinstance(hook, OwnScore) for hook in router._forward_hooks.values())
    return bool(family.weigh.sums_to_one(router)) and not revived  # type: ignore[attr-defined]
