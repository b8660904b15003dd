"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder` at the end, or vanishes on an error.

    Raises:
        ValueError: `folder` exists and is no model folder (it has no config.json).
    """
    if folder.exists() and not _replaceable(folder):
        raise ValueError(f"{folder} exists and is not a model folder; choose another place or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in (*staging.iterdir(), staging):
            _sync(path)
        _replace(folder, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _sync(folder.parent)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _replace(folder: Path, staging: Path) -> None:
    """Two renames: a folder cannot be exchanged for a full one in a single portable step."""
    if not folder.exists():
        staging.rename(folder)
        return
    old = staging.with_name(staging.stem + ".old.tmp")
    folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
