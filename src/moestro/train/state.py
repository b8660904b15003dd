"""What decides the next step of a run, taken between two steps and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.train.optimiser import named_state


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: optimiser steps done; also the data cursor, because batches are a pure function of the step.
        seconds: training time so far.
        tensors: `model.*`, `optimiser.<parameter>.*` and `random.*`.
        numbers: states of the random generators that are no tensors.
        fingerprint: what must not differ for the resumed run to repeat the uninterrupted one, by name.
        spent: seconds by what they were spent on, see `Goodput`.
        bits_per_byte: of the last evaluation before it, None before the first.
    """

    step: int
    seconds: float
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    fingerprint: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    bits_per_byte: float | None = None


def capture(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    fingerprint: Mapping[str, str] | None = None,
    *,
    spent: Mapping[str, float] | None = None,
    bits_per_byte: float | None = None,
) -> Checkpoint:
    """The state of a run between two steps; see `Checkpoint`."""
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    for name, state in named_state(optimiser):
        tensors |= {f"optimiser.{name}.{key}": value for key, value in state.items()}
    random_tensors, numbers = _random_states()
    tensors |= random_tensors
    return Checkpoint(step, seconds, tensors, numbers, dict(fingerprint or {}), dict(spent or {}), bits_per_byte)


def restore(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put a captured state back.

    Raises ValueError when the checkpoint's tensors are not exactly those of this model.
    """
    saved = dict(checkpoint.tensors)
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            _copy(saved, f"model.{name}", tensor)
        for group in optimiser.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                optimiser.state[parameter] = _take_state(saved, f"optimiser.{name}.", parameter)
    _set_random_states(saved, checkpoint.numbers)
    if saved:
        raise ValueError(f"the checkpoint holds {min(saved)}, which this model does not have; {_MEND}")


_MEND = "start again with overwrite, or give another output folder"


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (each once, also when tied) and the buffers that are part of the state."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _copy(saved: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    value = saved.pop(name, None)
    if value is None or value.shape != tensor.shape or value.dtype != tensor.dtype:
        found = "nothing" if value is None else f"{list(value.shape)} {value.dtype}"
        raise ValueError(
            f"the checkpoint has {found} for {name}, the model {list(tensor.shape)} {tensor.dtype}; {_MEND}"
        )
    tensor.copy_(value)


def _take_state(saved: dict[str, Tensor], prefix: str, parameter: Tensor) -> dict[str, Tensor]:
    keys = [name for name in saved if name.startswith(prefix) and "." not in name[len(prefix) :]]
    return {name[len(prefix) :]: saved.pop(name).to(parameter.device) for name in keys}


def _random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    state: Any = np.random.get_state(legacy=True)
    kind, words, position, has_gauss, gauss = state
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(words.astype(np.int64))}
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"random.cuda.{device}": state for device, state in enumerate(states)}
    version, numbers, gauss_next = random.getstate()
    return tensors, {
        "numpy": [kind, position, has_gauss, gauss],
        "python": [version, list(numbers), gauss_next],
    }


def _set_random_states(saved: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    torch.set_rng_state(saved.pop("random.torch"))
    kind, position, has_gauss, gauss = numbers["numpy"]
    words = saved.pop("random.numpy").numpy().astype(np.uint32)
    np.random.set_state((kind, words, position, has_gauss, gauss))
    version, words, gauss_next = numbers["python"]
    random.setstate((version, tuple(words), gauss_next))
    for name in [name for name in saved if name.startswith("random.cuda.")]:
        torch.cuda.set_rng_state(saved.pop(name), int(name.rpartition(".")[2]))
