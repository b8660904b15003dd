"""Convert a model between the layouts of transformers, mergekit, llama.cpp and moestro."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from moestro.hf.layouts import LAYOUTS, Relayout, StockFolder
from moestro.hf.layouts.relayout import Progress
from moestro.hf.layouts.writer import MAX_SHARD_SIZE
from moestro.models.staging import write_folder


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        path: the new folder or file.
        model_type: the family.
        source: layout before.
        layout: layout now.
        tensors: number of tensors written.
        nbytes: their bytes.
        opens: who opens the result.
    """

    path: Path
    model_type: str
    source: str
    layout: str
    tensors: int
    nbytes: int
    opens: str


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the model at `source` to `target` in another layout; weights keep every bit.

    One expert is in memory at a time. The source is checked whole before anything is written, and the target
    appears whole or not at all.

    Args:
        source: a model folder of transformers.
        target: a folder that does not exist yet.
        to: transformers (what `save_pretrained` writes), fused (what the modules hold), mergekit, or, for tools
            that ask for them, per-expert, w1w2w3, transposed, interleaved.
        dtype: of a GGUF file; folders keep their own.
        max_shard_size: bytes of one file.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ValueError: the source is unsupported, incomplete or unsafe, the layout is unknown, or the target exists.
    """
    if to not in LAYOUTS:
        raise ValueError(f"unknown layout {to!r}; expected {', '.join(LAYOUTS)}")
    if dtype is not None:
        raise ValueError(f"dtype={dtype} has no meaning for a folder, which keeps the bits it has; leave it out")
    source, target = Path(source), Path(target)
    _refuse_existing(target)
    with StockFolder(source) as folder:
        plan = Relayout(folder, to)
        _check_space(target, plan.nbytes)
        with write_folder(target) as staging:
            plan.write(staging, max_shard_size, progress)
        opens = "transformers" if to in plan.family.opens else "moestro"
        return Converted(target, folder.model_type, plan.source, to, len(plan.tensors), plan.nbytes, opens)


def _refuse_existing(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ValueError(f"{target} exists; choose another place or remove it first")


def _check_space(target: Path, nbytes: int) -> None:
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ValueError(f"{target} needs {nbytes} bytes but only {free} are free in {parent}; make room")
