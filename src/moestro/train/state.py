"""What decides the next step of a run, taken between two steps and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.train.fragments import Fragment, Pieces, piece_name
from moestro.train.part import Part, take_part


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: optimiser steps done; also the data cursor, because batches are a pure function of the step.
        seconds: training time so far.
        tensors: `model.*`, `optimiser.<parameter>.*`, `random.*`, `placement.*` and `transport.*`, whole or in
            pieces, see `moestro.train.fragments`.
        numbers: states of the random generators that are no tensors.
        fingerprint: what must not differ for the resumed run to repeat the uninterrupted one, by name.
        spent: seconds by what they were spent on, see `Goodput`.
        bits_per_byte: of the last evaluation before it, None before the first.
        model: the arguments of `moestro.models.build_language_model` that build the model.
    """

    step: int
    seconds: float
    tensors: Mapping[str, Tensor]
    numbers: dict[str, Any]
    fingerprint: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    bits_per_byte: float | None = None
    model: dict[str, Any] = field(default_factory=dict)


def capture(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    fingerprint: Mapping[str, str] | None = None,
    *,
    spent: Mapping[str, float] | None = None,
    bits_per_byte: float | None = None,
    part: Part | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """The state of a run between two steps, as far as this process has to write it; see `Checkpoint`.

    Args:
        part: what this process holds of the model; None = all of it.
        more: tensors that all processes have alike, `placement.*` and `transport.*`.
    """
    part = part or take_part(model)
    fragments = part.fragments(model)
    tensors = {f"model.{each.key}": each.of(each.tensor) for each in fragments if part.writes(each)}
    tensors |= _optimiser_tensors(fragments, optimiser, part)
    numbers: dict[str, Any] = {}
    if part.team.first:
        random_tensors, numbers = _random_states()
        tensors |= random_tensors | dict(more or {})
    return Checkpoint(
        step,
        seconds,
        tensors,
        numbers,
        dict(fingerprint or {}),
        dict(spent or {}),
        bits_per_byte,
        dict(getattr(model, "config", {})),
    )


def _optimiser_tensors(
    fragments: Sequence[Fragment], optimiser: torch.optim.Optimizer, part: Part
) -> dict[str, Tensor]:
    """The optimiser's state for every fragment whose state this process is the one to write."""
    tensors: dict[str, Tensor] = {}
    for each in fragments:
        for key, value in optimiser.state.get(each.tensor, {}).items() if part.writes_state(each) else ():
            name = f"optimiser.{each.name}.{key}"
            if value.ndim:
                tensors[piece_name(name, each.row, each.cut, each.span)] = each.of(value)
            elif (each.row is None or each.leads) and (each.span is None or each.span.first == 0):
                tensors[name] = value  # one number for all experts of the bank
    return tensors


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer, part: Part | None = None
) -> None:
    """Put a captured state back, in processes arranged as those that captured it or otherwise.

    Args:
        part: what this process holds of the model; None = all of it.

    Raises ValueError when the checkpoint's tensors are not exactly those of this model.
    """
    part = part or take_part(model)
    saved, fragments = Pieces(checkpoint.tensors), part.fragments(model)
    for name in sorted(saved.names):
        strange = _strange(name, saved, part.shapes)
        if strange is not None:
            raise ValueError(f"the checkpoint holds {strange}, which this model does not have; {_MEND}")
    try:
        with torch.no_grad():
            for each in fragments:
                _copy(saved, f"model.{each.name}", each, each.tensor)
            _restore_optimiser(saved, fragments, optimiser)
    except KeyError as error:
        raise ValueError(f"the checkpoint has nothing for {error.args[0]}; {_MEND}") from None
    _set_random_states(checkpoint.tensors, checkpoint.numbers)


_MEND = "start again with overwrite, or give another output folder"


def _strange(name: str, saved: Pieces, shapes: Mapping[str, torch.Size]) -> str | None:
    """What of a saved tensor a model with tensors of these shapes has no place for."""
    kind, _, parameter = name.partition(".")
    if kind in ("random", "placement", "transport"):
        return None
    shape = shapes.get(parameter.rpartition(".")[0] if kind == "optimiser" else parameter)
    if shape is None:
        return name
    rows = saved.num_rows(name)
    return piece_name(name, rows - 1) if rows > (shape[0] if shape else 0) else None


def _copy(saved: Pieces, name: str, fragment: Fragment, tensor: Tensor) -> None:
    """Fill a fragment's place in a tensor."""
    target = fragment.of(tensor)
    value = saved.read(name, fragment.row, fragment.cut, fragment.span)
    if value is None or value.shape != target.shape or value.dtype != target.dtype:
        found = "nothing" if value is None else f"{list(value.shape)} {value.dtype}"
        raise ValueError(
            f"the checkpoint has {found} for {name}, the model {list(target.shape)} {target.dtype}; {_MEND}"
        )
    target.copy_(value)


def _restore_optimiser(saved: Pieces, fragments: Sequence[Fragment], optimiser: torch.optim.Optimizer) -> None:
    """Give every parameter that this optimiser steps the state that was saved of it."""
    held: dict[int, list[Fragment]] = {}
    for each in fragments:
        held.setdefault(id(each.tensor), []).append(each)
    keys: dict[str, list[str]] = {}
    for name in sorted(saved.names):
        parameter, _, key = name.removeprefix("optimiser.").rpartition(".")
        if name.startswith("optimiser."):
            keys.setdefault(parameter, []).append(key)
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            pieces = held[id(parameter)]
            found = keys.get(pieces[0].name, [])
            optimiser.state[parameter] = {key: _state(saved, key, pieces, parameter) for key in found}


def _state(saved: Pieces, key: str, pieces: Sequence[Fragment], parameter: Tensor) -> Tensor:
    """One entry of the optimiser's state of a parameter: a single number, or a tensor like it."""
    name = f"optimiser.{pieces[0].name}.{key}"
    if not (saved.in_rows(name) or saved.in_spans(name)):
        value = saved.read(name)
        assert value is not None
        if not value.ndim:
            return value.to(parameter.device, copy=True)
        if pieces[0].place is None and pieces[0].row is None and pieces[0].span is None:
            return value.to(parameter.device, copy=True)
    state = torch.empty_like(parameter)
    for piece in pieces:
        _copy(saved, f"optimiser.{piece.name}.{key}", piece, state)
    return state


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


def _set_random_states(saved: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["random.torch"])
    kind, position, has_gauss, gauss = numbers["numpy"]
    words = saved["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, words, position, has_gauss, gauss))
    version, words, gauss_next = numbers["python"]
    random.setstate((version, tuple(words), gauss_next))
    for name in [name for name in saved if name.startswith("random.cuda.")]:
        index = int(name.rpartition(".")[2])
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(saved[name], index)
