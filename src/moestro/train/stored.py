"""The tensors of a checkpoint on disk, read one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from moestro.train.errors import DamagedCheckpoint

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Place:
    path: Path
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    xxh3_128: str


class StoredTensors(Mapping[str, Tensor]):
    """By name what the files of a checkpoint hold; a tensor is in memory only as long as the caller keeps it.

    Args:
        folder: of the checkpoint.
        files: what its manifest says of each file.

    Raises:
        DamagedCheckpoint: a file that cannot be read, now or later, or a tensor that is not what was written.
    """

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        self._places: dict[str, _Place] = {}
        for name, described in files.items():
            if "tensors" in described:
                self._places |= _places(folder / name, described["tensors"])

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        data = self._bytes(place, place.begin, place.end)
        if xxhash.xxh3_128_hexdigest(data) != place.xxh3_128:
            raise DamagedCheckpoint(f"{place.path} is damaged: the tensor {name} is not what was written")
        return _tensor(data, place.dtype, place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor, which is not read for that."""
        return self._places[name].shape

    def row(self, name: str, row: int) -> Tensor:
        """One row of a tensor, without reading the others."""
        place = self._places[name]
        size = (place.end - place.begin) // place.shape[0]
        data = self._bytes(place, place.begin + row * size, place.begin + (row + 1) * size)
        return _tensor(data, place.dtype, place.shape[1:])

    @staticmethod
    def _bytes(place: _Place, begin: int, end: int) -> bytearray:
        data = bytearray(end - begin)
        with open(place.path, "rb", buffering=0) as file:
            file.seek(begin)
            done, view = 0, memoryview(data)
            while done < len(data):
                count = file.readinto(view[done:])
                if not count:
                    raise DamagedCheckpoint(f"{place.path} is damaged: it ends at byte {begin + done}")
                done += count
        return data


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _places(path: Path, described: Mapping[str, Any]) -> dict[str, _Place]:
    """Where the tensors of a file are: the manifest knows the bytes, the file's header what they mean."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {
            name: _Place(
                path,
                int(place["at"][0]),
                int(place["at"][1]),
                _DTYPES[header[name]["dtype"]],
                tuple(header[name]["shape"]),
                place["xxh3_128"],
            )
            for name, place in described.items()
            if _sizes_agree(header[name], place)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__} {error}") from None


def _sizes_agree(entry: Mapping[str, Any], place: Mapping[str, Any]) -> bool:
    begin, end = place["at"]
    if math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize != end - begin:
        raise ValueError("its header and the manifest disagree")
    return True
