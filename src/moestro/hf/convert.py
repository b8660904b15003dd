"""Convert a model between the layouts of transformers, mergekit, llama.cpp and moestro."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.hf.layouts import LAYOUTS, Relayout, StockFolder
from moestro.hf.layouts.relayout import Progress
from moestro.hf.layouts.writer import MAX_SHARD_SIZE
from moestro.models.staging import write_folder

FOLDERS = ("transformers", "fused", "mergekit")
TARGETS = (*FOLDERS, "gguf", "moestro", *(name for name in LAYOUTS if name not in FOLDERS))


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
    """Write the model at `source` to `target` in another layout; weights keep every bit, but for GGUF's rounding.

    One expert is in memory at a time. The source is checked whole before anything is written, and the target
    appears whole or not at all.

    Args:
        source: a model folder of transformers or moestro, or a GGUF file.
        target: a folder, or with to="gguf" a file, that does not exist yet.
        to: transformers (what `save_pretrained` writes), fused (what the modules hold), mergekit, gguf, moestro
            (our own names), or, for tools that ask for them, per-expert, w1w2w3, transposed, interleaved.
        dtype: only of a GGUF file: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0; None = that of the model.
        max_shard_size: bytes of one file of a folder.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ValueError: the source is unsupported, incomplete or unsafe, the layout is unknown, or the target exists.
    """
    source, target = Path(source), Path(target)
    _check_request(to, dtype, max_shard_size)
    refuse_existing(target)
    if source.is_file():
        return _from_gguf(source, target, to, max_shard_size, progress)
    with StockFolder(source) as folder:
        if to == "gguf":
            return _to_gguf(folder, target, dtype, progress)
        if "moestro" in (to, folder.model_type):
            return _own_layout(folder, target, to, progress)
        return _relayout(folder, target, to, max_shard_size, progress)


def _check_request(to: str, dtype: str | None, max_shard_size: int) -> None:
    if to not in TARGETS:
        raise ValueError(f"unknown layout {to!r}; expected {', '.join(TARGETS)}")
    if dtype is not None and to != "gguf":
        raise ValueError(f"dtype={dtype} has no meaning for a folder, which keeps the bits it has; leave it out")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size}; pass bytes, for example 5000000000")


def _relayout(folder: StockFolder, target: Path, to: str, max_shard_size: int, progress: Progress) -> Converted:
    plan = Relayout(folder, to)
    check_space(target, plan.nbytes)
    with write_folder(target) as staging:
        plan.write(staging, max_shard_size, progress)
    opens = "transformers" if to in plan.family.opens else "moestro"
    return Converted(target, folder.model_type, plan.source, to, len(plan.tensors), plan.nbytes, opens)


def _own_layout(folder: StockFolder, target: Path, to: str, progress: Progress) -> Converted:
    """Into our own layout, or out of it."""
    from moestro.hf.loading import to_own_layout, to_stock_layout

    if to not in ("moestro", "transformers"):
        raise ValueError(f"a folder in our own layout becomes one of transformers, not {to}; convert that one on")
    rewrite = to_own_layout if to == "moestro" else to_stock_layout
    nbytes = sum(entry.nbytes for entry in folder.tensors.values())
    check_space(target, nbytes)
    with write_folder(target) as staging:
        count = rewrite(folder, staging, progress)
    source = "moestro" if folder.model_type == "moestro" else "transformers"
    return Converted(target, folder.model_type, source, to, count, nbytes, to)


def _to_gguf(folder: StockFolder, target: Path, dtype: str | None, progress: Progress) -> Converted:
    from moestro.hf.gguf_write import GGUFPlan

    plan = GGUFPlan(folder, dtype)
    check_space(target, plan.nbytes)
    with _whole_file(target) as staging:
        plan.write(staging, progress)
    layout = f"gguf {plan.dtype}"
    return Converted(target, folder.model_type, plan.layout, layout, len(plan.tensors), plan.nbytes, "llama.cpp")


def _from_gguf(source: Path, target: Path, to: str, max_shard_size: int, progress: Progress) -> Converted:
    from moestro.hf.gguf_read import GGUFSource

    if to != "transformers":
        raise ValueError(f"a GGUF file becomes a folder of transformers, not {to}; convert that folder on")
    plan = GGUFSource(source)
    check_space(target, plan.nbytes)
    with write_folder(target) as staging:
        plan.write(staging, max_shard_size, progress)
    kind = str(plan.config["model_type"])
    return Converted(target, kind, "gguf", to, len(plan.tensors), plan.nbytes, "transformers")


@contextlib.contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A file beside the target that takes its place at the end, or vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.tmp")
    try:
        yield staging
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def refuse_existing(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ValueError(f"{target} exists; choose another place or remove it first")


def check_space(target: Path, nbytes: int) -> None:
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ValueError(f"{target} needs {nbytes} bytes but only {free} are free in {parent}; make room")
