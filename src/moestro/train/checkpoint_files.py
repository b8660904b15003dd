"""One checkpoint on disk: safetensors and JSON, and a manifest, written last, that knows every byte.

    step-00000100/
      model.safetensors  optimiser.safetensors  random.safetensors      every tensor
      model-rank-1.safetensors ...                                      what other processes held, see `fragments`
      state.json                                                        every number
      manifest.json      of each file its size and checksum, of each tensor its place and checksum

Every process writes its files into the folder that the first has made; the manifest comes when all have arrived.
Checksums are xxh3-128: they find accidents, not attackers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save

from moestro.train.durable import arriving, write_file
from moestro.train.errors import DamagedCheckpoint
from moestro.train.state import Checkpoint
from moestro.train.stored import StoredTensors
from moestro.train.team import ALONE, Team

FORMAT = 4  # 2 had no pieces of tensors, 3 no runs of rows
MANIFEST, STATE = "manifest.json", "state.json"
_GROUPS = ("model", "optimiser", "random")
_OPTIONAL = ("placement", "transport")
_ROOM = 1 << 20  # for JSON, headers and names
_CHUNK = 1 << 23  # bytes read at once


@dataclass(frozen=True)
class Verified:
    """What reading a checkpoint against its manifest cost."""

    num_bytes: int
    seconds: float

    @property
    def gib_per_second(self) -> float:
        return self.num_bytes / 2**30 / max(self.seconds, 1e-9)


def write_checkpoint(target: Path, checkpoint: Checkpoint, team: Team = ALONE) -> None:
    """Write a checkpoint as the folder `target`, whole or not at all, each process what it has of it.

    Raises:
        OSError: the disk has no room, which is asked before anything is written, or fails, for one process or all.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    needed = sum(team.gather(sum(tensor.nbytes for tensor in tensors.values())))
    team.by_first(lambda: _need_room(target.parent, needed + _ROOM))
    with team.held_by_first(lambda: _as_text(arriving(target))) as folder:
        mine = team.together(lambda: _write_tensors(Path(folder), tensors, team))
        everyones = team.gather(mine)
        team.by_first(lambda: _write_rest(Path(folder), checkpoint, dict(ChainMap(*everyones))))


@contextmanager
def _as_text(arriving: AbstractContextManager[Path]) -> Iterator[str]:
    with arriving as folder:
        yield str(folder)


def _write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], team: Team) -> dict[str, Any]:
    """The files of one process, and what the manifest says of them."""
    files: dict[str, Any] = {}
    for group in (*_GROUPS, *_OPTIONAL):
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{group}.")}
        if not own and (group in _OPTIONAL or not team.first):
            continue
        data = save(own)
        name = f"{group}.safetensors" if team.first else f"{group}-rank-{team.rank}.safetensors"
        files[name] = _described(data) | {"tensors": _places(data)}
        write_file(folder / name, data)
    return files


def _write_rest(folder: Path, checkpoint: Checkpoint, files: dict[str, Any]) -> None:
    state = json.dumps({name: getattr(checkpoint, name) for name in _NUMBERS}).encode()
    files[STATE] = _described(state)
    write_file(folder / STATE, state)
    write_file(folder / MANIFEST, _manifest(files))


_NUMBERS = ("step", "seconds", "numbers", "fingerprint", "spent", "bits_per_byte", "model")


def read_checkpoint(folder: Path, team: Team = ALONE) -> Checkpoint:
    """A checkpoint, every byte compared with the manifest, work that processes share; tensors are read later.

    Raises:
        DamagedCheckpoint: a file or tensor is missing, extra or not what was written.
        ValueError: written by a newer version.
    """
    files = team.together(lambda: _verified_files(folder, team))
    numbers = team.together(lambda: json.loads(_read(folder / STATE)))
    kept = {name: numbers[name] for name in _NUMBERS if name in numbers}  # older formats lack some
    return Checkpoint(tensors=StoredTensors(folder, files), **kept)


def verify_checkpoint(folder: Path) -> Verified:
    """Compare every byte with the manifest; raises like `read_checkpoint`."""
    started = time.perf_counter()
    files = _verified_files(folder, ALONE)
    return Verified(sum(expected["bytes"] for expected in files.values()), time.perf_counter() - started)


def read_numbers(folder: Path) -> dict[str, Any]:
    """The numbers of a checkpoint without its tensors, not verified: for lists."""
    try:
        return dict(json.loads((folder / STATE).read_bytes()))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder / STATE} cannot be read: {error}") from None


def _verified_files(folder: Path, team: Team) -> dict[str, Any]:
    """What the manifest says of each file, all of which are there; this process's share of them is as it says."""
    files = _read_manifest(folder)
    present = set(os.listdir(folder)) - {MANIFEST}
    if strange := sorted(present ^ files.keys()):
        what = "is missing" if strange[0] in files else "does not belong there"
        raise DamagedCheckpoint(f"{folder} is damaged: {strange[0]} {what}")
    for name in sorted(files)[team.rank :: team.size]:
        _verify(folder / name, files[name])
    return files


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    size, digest = 0, xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if size != expected["bytes"]:
        raise DamagedCheckpoint(f"{path} is damaged: it has {size} bytes instead of {expected['bytes']}")
    if digest.hexdigest() != expected["xxh3_128"]:
        raise DamagedCheckpoint(f"{path} is damaged: {_culprit(path, expected)}")


def _read(path: Path, begin: int = 0, end: int | None = None) -> bytes:
    """A part of a file."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read() if end is None else file.read(end - begin)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None


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


def _culprit(path: Path, expected: Mapping[str, Any]) -> str:
    """What in a file of the right size differs: the first tensor that does, or what lies around tensors."""
    for name, place in expected.get("tensors", {}).items():
        if xxhash.xxh3_128_hexdigest(_read(path, *place["at"])) != place["xxh3_128"]:
            return f"the tensor {name} is not what was written"
    return "its header is not what was written" if "tensors" in expected else "it is not what was written"


def _need_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"a checkpoint needs {num_bytes / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB free; "
            "make room there, or keep fewer checkpoints (train.keep_last, train.keep_every)"
        )
