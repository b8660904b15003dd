"""From the tensors of a training run to a model folder, with no more than one expert's matrix in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moestro.data import Tokenizer
from moestro.hf.convert import Converted, check_space, refuse_existing
from moestro.hf.layouts.writer import MAX_SHARD_SIZE, ShardWriter
from moestro.hf.loading import ONE_FILE, new_tensors
from moestro.models import build_language_model
from moestro.models.folder import write_settings
from moestro.models.layouts import LAYOUTS, Choice, choose_layout
from moestro.models.layouts.rules import Rule
from moestro.models.staging import write_folder

Progress = Callable[[int, int], None]


class Source(Protocol):
    """A model whose tensors are read one at a time, under our names; `moestro.train` has one of a checkpoint."""

    @property
    def arguments(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def read(self, name: str) -> Tensor: ...
    def rows(self, name: str, count: int) -> Iterator[Tensor]: ...


def write_trained(
    source: Source,
    target: str | Path,
    to: str | None = None,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write a model as `moestro.save_model` does, without ever holding it.

    Args:
        source: where its tensors come from; read in the order in which they are written.
        target: a folder that does not exist yet; appears whole or not at all.
        to: `transformers`, a layout that stock transformers opens; `moestro`, our own; None = a stock one if it
            computes exactly this model, else our own.
        max_shard_size: bytes of one file; our own layout has one file.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ValueError: the target exists, no stock layout computes the model, or another layout is asked for.
    """
    target = Path(target)
    refuse_existing(target)
    with torch.device("meta"):  # shapes and names only
        model = build_language_model(**source.arguments)
    choice = _choice(to, choose_layout(model))
    rules, state = choice.layout.rules(model), model.state_dict()
    new = list(new_tensors(rules, state))
    nbytes = sum(tensor.nbytes for tensor in new)
    check_space(target, nbytes)
    own = choice.layout.architecture is None
    with write_folder(target) as staging:
        write_settings(staging, model, choice, source.tokenizer.eos_id)
        source.tokenizer.save(staging)
        with ShardWriter(staging, new, ONE_FILE if own else max_shard_size) as writer:
            done = 0
            for name, start, piece in _pieces(rules, state, source):
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                writer.write(name, data.data, start)
                done += data.nbytes
                progress(done, nbytes)
    opens = "moestro" if own else "transformers"
    kind = choice.layout.model_type
    return Converted(target, kind, "a checkpoint", opens, len(new), nbytes, opens)


def _choice(to: str | None, choice: Choice) -> Choice:
    if to not in (None, "transformers", "moestro"):
        raise ValueError(f"a checkpoint becomes a folder of transformers or moestro, not {to}; convert that one on")
    if to == "moestro":
        return Choice(LAYOUTS["moestro"], "as asked")
    if to == "transformers" and choice.layout.architecture is None:
        raise ValueError(f"no architecture of transformers computes this model: {choice.reason}; use --to moestro")
    return choice


def _pieces(
    rules: Iterable[Rule], state: Mapping[str, Tensor], source: Source
) -> Iterator[tuple[str, int, Tensor]]:
    """Name in the file, first byte and values of every piece; of stacked experts one expert at a time."""
    for rule in rules:
        shape = state[rule.ours[0]].shape
        if len(shape) < 3:
            parts = rule.split([_checked(source.read(name), shape, name) for name in rule.ours])
            yield from ((name, 0, part) for name, part in zip(rule.theirs, parts, strict=True))
            continue
        banks = [source.rows(name, shape[0]) for name in rule.ours]
        for index, rows in enumerate(zip(*banks, strict=True)):
            pairs = zip(rule.ours, rows, strict=True)
            (part,) = rule.split([_checked(row, shape[1:], name).unsqueeze(0) for name, row in pairs])
            if len(rule.theirs) == shape[0]:
                yield rule.theirs[index], 0, part
            else:
                yield rule.theirs[0], index * part.nbytes, part


def _checked(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)} but the model has {list(shape)}")
    return tensor
