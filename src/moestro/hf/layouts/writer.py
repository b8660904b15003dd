"""Writing safetensors files piece by piece, so that no more than a piece is ever in memory.

The library's own writer takes all tensors of a file at once. The format is short enough to say here: eight bytes
with the length of a JSON header, the header, the tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moestro.hf.layouts.folder import INDEX, WEIGHTS
from moestro.hf.layouts.header import ITEM_SIZES

MAX_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: name, dtype as the format calls it, sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


class ShardWriter:
    """The files of a model, laid out in advance and filled in any order.

    Args:
        folder: where.
        tensors: all of them, in the order of the files.
        max_shard_size: bytes of a file; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, tensors: Iterable[NewTensor], max_shard_size: int = MAX_SHARD_SIZE):
        self._places: dict[str, tuple[int, int, int]] = {}  # descriptor, first byte, bytes
        self._descriptors: list[int] = []
        shards = _shards(list(tensors), max_shard_size)
        names = _file_names(len(shards))
        try:
            for name, shard in zip(names, shards, strict=True):
                self._open(folder / name, shard)
            if len(shards) > 1:
                _write_index(folder / INDEX, dict(zip(names, shards, strict=True)))
        except BaseException:
            self.close()
            raise

    def write(self, name: str, data: bytes | bytearray | memoryview, start: int = 0) -> None:
        """Put bytes into a tensor, from its byte `start`."""
        descriptor, place, nbytes = self._places[name]
        view = memoryview(data).cast("B")
        assert start + len(view) <= nbytes, f"{name} takes {nbytes} bytes"
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + 2**30], place + start + done)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, path: Path, tensors: list[NewTensor]) -> None:
        header = _header(tensors)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        place = os.write(descriptor, len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            self._places[tensor.name] = (descriptor, place, tensor.nbytes)
            place += tensor.nbytes
        os.truncate(descriptor, place)


def _shards(tensors: list[NewTensor], max_shard_size: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _file_names(number: int) -> list[str]:
    if number == 1:
        return [WEIGHTS]
    return [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]


def _header(tensors: list[NewTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        end = place + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_index(path: Path, shards: dict[str, list[NewTensor]]) -> None:
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards.values() for tensor in shard)},
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
