"""Finding the model that a path means: a model folder, or the folder of a run that holds one."""

from __future__ import annotations

from pathlib import Path


def model_folder(path: Path) -> Path:
    """The Hugging Face folder at `path` or, when that is a run, in its `model/`.

    Raises:
        ValueError: there is none.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise ValueError(f"there is nothing at {path}; pass a model folder or a run such as runs/first-seed0")
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is a file; make it a folder: moestro convert {path} FOLDER --to transformers")
    raise ValueError(f"{path} holds no model; a model folder has a config.json, a finished run has one in model/")
