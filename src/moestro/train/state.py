"""Saving and resuming a stopped run: every tensor in safetensors, every number in JSON, nothing pickled.

A checkpoint is the folder `checkpoint/step-N`. It is written under another name, synced, and renamed, so it is
whole or absent; the one before it goes only when it has arrived.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from moestro.train.optimiser import named_state

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: optimiser steps done; also the data cursor, because batches are a pure function of the step.
        seconds: training time so far.
        tensors: `model.*`, `optimiser.<parameter>.*` and `random.*`.
        numbers: states of the random generators that are no tensors.
        fingerprint: what must not differ for the resumed run to repeat the uninterrupted one, by name.
    """

    step: int
    seconds: float
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    fingerprint: dict[str, str] = field(default_factory=dict)


def capture(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    fingerprint: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The state of a run between two steps."""
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    for name, state in named_state(optimiser):
        tensors |= {f"optimiser.{name}.{key}": value for key, value in state.items()}
    random_tensors, numbers = _random_states()
    return Checkpoint(step, seconds, tensors | random_tensors, numbers, dict(fingerprint or {}))


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


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-N`, whole or not at all, then remove what it replaces."""
    folder.mkdir(exist_ok=True)
    target = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f"{target.name}.tmp"
    data = save({name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()})
    facts = {
        "format": FORMAT,
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "fingerprint": checkpoint.fingerprint,
        "checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}",
        "random": checkpoint.numbers,
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary / "state.safetensors", data)
        _write(temporary / "state.json", json.dumps(facts).encode())
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for other in folder.glob("step-*"):
        if other != target:
            shutil.rmtree(other)
    return target


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest checkpoint in `folder`, or None; ValueError when it is damaged or of a newer format."""
    found = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
    if not found:
        return None
    try:
        facts = json.loads((found[-1] / "state.json").read_bytes())
        data = (found[-1] / "state.safetensors").read_bytes()
        if facts["format"] > FORMAT:
            raise ValueError(f"{found[-1]} was written by a newer moestro; upgrade to resume it")
        if facts["checksum"] != f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}":
            raise ValueError(f"{found[-1]} is damaged: its checksum does not match; {_MEND}")
        return Checkpoint(facts["step"], facts["seconds"], load(data), facts["random"], facts["fingerprint"])
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{found[-1]} is damaged ({error}); {_MEND}") from None


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


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
