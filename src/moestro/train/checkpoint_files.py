"""One checkpoint on disk: safetensors and JSON, and a manifest, written last, that knows every byte.

    step-00000100/
      model.safetensors  optimiser.safetensors  random.safetensors      every tensor
      state.json                                                        every number
      manifest.json      of each file its size and checksum, of each tensor its place and checksum

Checksums are xxh3-128: they find accidents, not attackers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save

from moestro.train.durable import arriving, write_file
from moestro.train.state import Checkpoint

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
_GROUPS = ("model", "optimiser", "random")
_ROOM = 1 << 20  # for JSON, headers and names


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; names the file and, where it can, the tensor."""


@dataclass(frozen=True)
class Verified:
    """What reading a checkpoint against its manifest cost."""

    num_bytes: int
    seconds: float

    @property
    def gib_per_second(self) -> float:
        return self.num_bytes / 2**30 / max(self.seconds, 1e-9)


def write_checkpoint(target: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as the folder `target`, whole or not at all.

    Raises:
        OSError: the disk has no room, which is asked before anything is written, or fails.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    _need_room(target.parent, sum(tensor.nbytes for tensor in tensors.values()) + _ROOM)
    with arriving(target) as folder:
        files: dict[str, Any] = {}
        for group in _GROUPS:
            data = save({name: tensor for name, tensor in tensors.items() if name.startswith(f"{group}.")})
            files[f"{group}.safetensors"] = _described(data) | {"tensors": _places(data)}
            write_file(folder / f"{group}.safetensors", data)
        state = json.dumps({name: getattr(checkpoint, name) for name in _NUMBERS}).encode()
        files[STATE] = _described(state)
        write_file(folder / STATE, state)
        write_file(folder / MANIFEST, _manifest(files))


_NUMBERS = ("step", "seconds", "numbers", "fingerprint", "spent", "bits_per_byte")


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, every byte compared with the manifest.

    Raises:
        DamagedCheckpoint: a file or tensor is missing, extra or not what was written.
        ValueError: written by a newer version.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, data in _verified(folder):
        try:
            if name == STATE:
                numbers = json.loads(data)
            else:
                tensors |= load(data)
        except (SafetensorError, ValueError) as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read: {error}") from None
    return Checkpoint(tensors=tensors, **{name: numbers[name] for name in _NUMBERS})


def verify_checkpoint(folder: Path) -> Verified:
    """Compare every byte with the manifest; raises like `read_checkpoint`."""
    started = time.perf_counter()
    num_bytes = sum(len(data) for _, data in _verified(folder))
    return Verified(num_bytes, time.perf_counter() - started)


def read_numbers(folder: Path) -> dict[str, Any]:
    """The numbers of a checkpoint without its tensors, not verified: for lists."""
    try:
        return dict(json.loads((folder / STATE).read_bytes()))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder / STATE} cannot be read: {error}") from None


def _verified(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each file's name and bytes, equal to what the manifest says."""
    files = _read_manifest(folder)
    present = set(os.listdir(folder)) - {MANIFEST}
    if strange := sorted(present ^ files.keys()):
        what = "is missing" if strange[0] in files else "does not belong there"
        raise DamagedCheckpoint(f"{folder} is damaged: {strange[0]} {what}")
    for name, expected in files.items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read: {error.strerror}") from None
        if _described(data) != {key: expected[key] for key in ("bytes", "xxh3_128")}:
            raise DamagedCheckpoint(f"{folder / name} is damaged: {_culprit(data, expected)}")
        yield name, data


def _manifest(files: Mapping[str, Any]) -> bytes:
    body = {"format": FORMAT, "files": files}
    return _canonical({"manifest": body, "xxh3_128": xxhash.xxh3_128_hexdigest(_canonical(body))})


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        whole = json.loads(data)
        body = whole["manifest"]
        intact = data == _canonical(whole) and whole["xxh3_128"] == xxhash.xxh3_128_hexdigest(_canonical(body))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged or missing ({type(error).__name__})") from None
    if not intact:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum does not match")
    if body["format"] > FORMAT:
        raise ValueError(f"{folder} was written by a newer moestro (format {body['format']}); upgrade to resume it")
    return dict(body["files"])


def _canonical(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def _places(data: bytes) -> dict[str, Any]:
    """Where each tensor lies in a safetensors file, and its checksum."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            places[name] = {"at": [begin, end], "xxh3_128": xxhash.xxh3_128_hexdigest(data[begin:end])}
    return places


def _culprit(data: bytes, expected: Mapping[str, Any]) -> str:
    """What in a file differs: its size, the first tensor that does, or what lies around tensors."""
    if len(data) != expected["bytes"]:
        return f"it has {len(data)} bytes instead of {expected['bytes']}"
    for name, place in expected.get("tensors", {}).items():
        begin, end = place["at"]
        if xxhash.xxh3_128_hexdigest(data[begin:end]) != place["xxh3_128"]:
            return f"the tensor {name} is not what was written"
    return "its header is not what was written" if "tensors" in expected else "it is not what was written"


def _need_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"a checkpoint needs {num_bytes / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB free; "
            "make room there, or keep fewer checkpoints (train.keep_last, train.keep_every)"
        )
