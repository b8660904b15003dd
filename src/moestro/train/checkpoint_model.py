"""The model in a checkpoint, tensor by tensor, for whoever writes it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moestro.data import Tokenizer, open_tokenizer
from moestro.train.checkpoint_files import MANIFEST, read_checkpoint
from moestro.train.errors import DamagedCheckpoint
from moestro.train.folder import TOKENIZER
from moestro.train.fragments import Pieces


class CheckpointModel:
    """The model that a run had at a checkpoint, saved by any number of processes; verified when it is opened.

    Args:
        path: a checkpoint (`RUN/checkpoint/step-N`), a run, of which the newest checkpoint is taken, or the folder
            `twin` of a run.

    Attributes:
        path: the checkpoint.
        step: optimiser steps done.
        arguments: those of `moestro.models.build_language_model`.
        tokenizer: of its text.

    Raises:
        DamagedCheckpoint: a file of it is missing or not what was written; names the file and the tensor.
        ValueError: no checkpoint there, or one of a version that did not keep what is needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = newest_checkpoint(Path(path))
        checkpoint = read_checkpoint(self.path)
        if not checkpoint.model:
            raise ValueError(f"{self.path} was written by an older moestro; resume its run for a step to renew it")
        self.step, self.arguments = checkpoint.step, checkpoint.model
        self.tokenizer = _tokenizer_of(self.path)
        self._pieces = Pieces(checkpoint.tensors)

    def read(self, name: str) -> Tensor:
        """A tensor of the model."""
        return self._found(name, lambda: self._pieces.read(f"model.{name}"))

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The rows of a tensor, one expert each, one at a time."""
        for row in range(count):
            yield self._found(f"{name}[{row}]", lambda row=row: self._pieces.read(f"model.{name}", row))

    def _found(self, name: str, read: Any) -> Tensor:
        try:
            tensor: Tensor | None = read()
        except KeyError:
            tensor = None
        if tensor is None:
            raise DamagedCheckpoint(f"{self.path} holds nothing for {name}")
        return tensor


def is_checkpoint_or_run(path: Path) -> bool:
    """Whether `CheckpointModel` has something to open there."""
    return (path / MANIFEST).is_file() or (path / "checkpoint").is_dir()


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint at a path, or the newest of the run there; ValueError if there is none."""
    if (path / MANIFEST).is_file():
        return path
    found = sorted((path / "checkpoint").glob("step-????????"))
    if not found:
        raise ValueError(f"{path} holds no checkpoint; give a run, or one of the folders in its checkpoint/")
    return found[-1]


def _tokenizer_of(checkpoint: Path) -> Tokenizer:
    """The tokenizer that the run of a checkpoint keeps; a twin's run is one folder further up."""
    for folder in checkpoint.absolute().parents[1:3]:
        if (folder / TOKENIZER / "tokenizer.json").is_file():
            return open_tokenizer(folder / TOKENIZER)
    raise ValueError(f"no {TOKENIZER}/ in the run of {checkpoint}; leave checkpoints in the folder of their run")
