"""A model folder of transformers, opened without running or believing anything in it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from moestro.hf.layouts.header import Entry, parse_json, read_bytes, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
BESIDE = (".json", ".jinja", ".txt", ".model", ".md")  # small files that travel with a model
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MAX_JSON = 64_000_000
INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class StockFolder:
    """The configuration and tensors of a folder; tensors are read piece by piece.

    Refused are pickles, `auto_map` (code from data), file names that leave the folder, an index that does not say
    what its files hold, and files that are cut. Nothing of the weights is read until `read` is called.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        config: config.json.
        tensors: where every tensor lies, by name.

    Raises:
        ValueError: any of the above.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_config(self.path)
        _refuse_pickles(self.path)
        self.tensors = _read_tensors(self.path)
        self._files: dict[Path, int] = {}

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The bits of a tensor, or of its `index`-th part along the first axis, as unsigned integers."""
        entry = self.tensors[name]
        shape, start, nbytes = entry.shape, entry.start, entry.nbytes
        if index is not None:
            shape = shape[1:]
            nbytes = math.prod(shape) * entry.item_size
            start += index * nbytes
        return np.frombuffer(self._bytes(entry, start, nbytes), INTEGERS[entry.item_size]).reshape(shape)

    def read_raw(self, name: str, start: int, nbytes: int) -> bytearray:
        """Bytes of a tensor, from its byte `start`."""
        entry = self.tensors[name]
        return self._bytes(entry, entry.start + start, nbytes)

    def beside(self) -> list[Path]:
        """The small files to take along: tokenizer, generation settings, templates, model card."""
        skip = {"config.json", INDEX}
        return [
            path
            for path in sorted(self.path.iterdir())
            if path.suffix in BESIDE and path.name not in skip and path.is_file() and _inside(path)
        ]

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> StockFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _bytes(self, entry: Entry, start: int, nbytes: int) -> bytearray:
        if entry.path not in self._files:
            self._files[entry.path] = os.open(entry.path, os.O_RDONLY)
        return read_bytes(self._files[entry.path], start, nbytes, entry.path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, refused if it asks to run code.

    Raises:
        ValueError: no folder, no config.json, not a JSON object, no model_type, or an `auto_map`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; pass a model folder with a config.json")
    return read_config_file(folder / "config.json")


def read_config_file(path: Path) -> dict[str, Any]:
    """A config.json, refused if it asks to run code.

    Raises:
        ValueError: no such file, not a JSON object, no model_type, or an `auto_map`.
    """
    config = _read_json(path)
    if "auto_map" in config:
        raise ValueError(
            f"{path} asks to run code of its own (auto_map); moestro runs none. If "
            "transformers has this architecture, remove the entry auto_map"
        )
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} has no model_type, so nobody knows what it describes")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; pass a complete model folder")
    if not _inside(path):
        raise ValueError(f"{path} is a link out of its folder; put the file itself there")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; moestro reads at most {MAX_JSON}")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; restore the file")
    return content


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds {pickles[0]}, which can run code when it is read; save the model as safetensors and "
            "move such files away"
        )


def _read_tensors(folder: Path) -> dict[str, Entry]:
    if not (folder / INDEX).is_file():
        return _read_single(folder)
    files = _indexed(folder, _read_json(folder / INDEX))
    shards = {path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)}
    if shards - set(files):
        raise ValueError(f"{folder / INDEX} does not mention {min(shards - set(files))}; restore one of them")
    found: dict[str, Entry] = {}
    for file, names in files.items():
        entries = read_header(folder / file)
        _compare(names, set(entries), folder / file)
        found |= entries
    return found


def _read_single(folder: Path) -> dict[str, Entry]:
    shards = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))
    if shards:
        raise ValueError(f"{folder} holds {shards[0]} but no {INDEX}; restore it")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}; pass a complete model folder")
    if not _inside(folder / WEIGHTS):
        raise ValueError(f"{folder / WEIGHTS} is a link out of its folder; put the file itself there")
    return read_header(folder / WEIGHTS)


def _indexed(folder: Path, index: dict[str, Any]) -> dict[str, set[str]]:
    """The tensor names that the index gives each file; every file is there and in the folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map; restore the file")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.\-]{0,200}\.safetensors", file):
            raise ValueError(
                f"{folder / INDEX} places {name!r} in {file!r}, which is no file name of this folder; restore it"
            )
        files.setdefault(file, set()).add(name)
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} files); download it again")
    escaped = sorted(file for file in files if not _inside(folder / file))
    if escaped:
        raise ValueError(f"{folder / escaped[0]} is a link out of its folder; put the file itself there")
    return files


def _compare(promised: set[str], held: set[str], path: Path) -> None:
    if promised - held:
        raise ValueError(f"{path} does not hold {min(promised - held)}, which the index places there")
    if held - promised:
        raise ValueError(f"{path} holds {min(held - promised)}, which the index does not place there")


def _inside(path: Path) -> bool:
    """Whether a file is in its folder, or a link into the store of a Hugging Face cache around it."""
    real, folder = path.resolve(), path.parent.resolve()
    if real.parent == folder:
        return True
    return folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
