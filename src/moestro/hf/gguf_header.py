"""Reading the structure of a GGUF file, believing nothing that the file says about itself.

The gguf package maps a file and trusts its counts: forty bytes that claim 2^33 elements fill the memory. Every
count is compared here with the bytes that are left before anything is read.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME = 100_000, 1_000_000, 4, 65_535
MAX_STRINGS, MAX_TEXT = 10_000_000, 256_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file.

    Attributes:
        kind: number of its type.
        shape: sizes, outermost first, as numpy has them (GGUF writes them the other way round).
        start: first byte in the file.
        nbytes: bytes.
    """

    kind: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Settings and tensors of a GGUF file, by name."""

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """The settings and tensors of a GGUF file, all of which lie within it.

    Raises:
        ValueError: no GGUF file, an unknown version or type, a count that the file is too short for, a name given
            twice, tensors that overlap, or a file that was cut.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        num_tensors, num_keys = reader.start()
        settings = reader.settings(num_keys)
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
            raise ValueError(f"{path} has alignment {alignment!r}; expected a power of two up to 1048576")
        tensors = reader.tensors(num_tensors, alignment)
    return GGUFHeader(path, settings, tensors)


class _Reader:
    """A cursor that asks how much is left before it reads."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def start(self) -> tuple[int, int]:
        magic, version = self.take(4, "its magic number"), self.scalar(4, "its version")
        if magic != MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it starts with {magic!r}")
        if version not in VERSIONS:
            raise ValueError(
                f"{self.path} has GGUF version {version} (or the other byte order); moestro reads {VERSIONS}"
            )
        num_tensors, num_keys = self.scalar(10, "its tensor count"), self.scalar(10, "its key count")
        # a key takes at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 4 + 8
        self.fits(num_keys, 13, MAX_KEYS, "keys")
        self.fits(num_tensors, 24, MAX_TENSORS, "tensors")
        return num_tensors, num_keys

    def settings(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text("the name of a key", MAX_NAME)
            if name in found:
                raise ValueError(f"{self.path} names the key {name!r} twice")
            found[name] = self.value(self.scalar(4, name), name)
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, Stored]:
        told = {}
        for _ in range(count):
            name = self.text("the name of a tensor", MAX_NAME)
            if name in told:
                raise ValueError(f"{self.path} names the tensor {name!r} twice")
            told[name] = self.tensor(name)
        data = -(-self.file.tell() // alignment) * alignment
        found = {name: Stored(kind, shape, data + at, nbytes) for name, (kind, shape, at, nbytes) in told.items()}
        self.check_places(found, data, alignment)
        return found

    def tensor(self, name: str) -> tuple[int, tuple[int, ...], int, int]:
        dimensions = self.scalar(4, name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{self.path}: {name} has {dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(self.scalar(10, name) for _ in range(dimensions))[::-1]
        kind, start = self.scalar(4, name), self.scalar(10, name)
        return kind, shape, start, self.nbytes(name, kind, shape)

    def nbytes(self, name: str, kind: int, shape: tuple[int, ...]) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"{self.path}: {name} has type {kind}, which this gguf package does not know")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[-1] % block:
            raise ValueError(f"{self.path}: rows of {name} have {shape[-1]} entries, not a multiple of {block}")
        return math.prod(shape) // block * size

    def check_places(self, tensors: dict[str, Stored], data: int, alignment: int) -> None:
        place = data
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < place or (tensor.start - data) % alignment:
                raise ValueError(f"{self.path}: {name} overlaps another tensor or is not aligned")
            place = -(-(tensor.start + tensor.nbytes - data) // alignment) * alignment + data
            if place > self.size:
                raise ValueError(
                    f"{self.path} has {self.size} bytes but {name} ends at {place}; it was cut, fetch it again"
                )

    def value(self, kind: int, name: str) -> Any:
        if kind == STRING:
            return self.text(name, MAX_TEXT)
        if kind != ARRAY:
            return self.scalar(kind, name)
        kind, count = self.scalar(4, name), self.scalar(10, name)
        if kind == STRING:
            self.fits(count, 8, MAX_STRINGS, f"strings in {name}")
            return [self.text(name, MAX_TEXT) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {name} is an array of type {kind}, which moestro does not read")
        dtype = np.dtype(f"<{SCALARS[kind]}") if SCALARS[kind] != "?" else np.dtype(bool)
        self.fits(count, dtype.itemsize, MAX_STRINGS, f"elements in {name}")
        return np.frombuffer(self.take(count * dtype.itemsize, name), dtype).tolist()

    def scalar(self, kind: int, name: str) -> Any:
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {name} has type {kind}, which GGUF does not have")
        form = f"<{SCALARS[kind]}"
        return struct.unpack(form, self.take(struct.calcsize(form), name))[0]

    def text(self, name: str, limit: int) -> str:
        length = self.scalar(10, name)
        self.fits(length, 1, limit, f"bytes of {name}")
        try:
            return self.take(length, name).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {name} is not UTF-8") from None

    def take(self, count: int, name: str) -> bytes:
        if count > self.left:
            raise ValueError(f"{self.path} ends within {name}; it was cut, fetch it again")
        return self.file.read(count)

    def fits(self, count: int, size: int, limit: int, what: str) -> None:
        if count > limit or count * size > self.left:
            raise ValueError(
                f"{self.path} claims {count} {what}, but {self.left} bytes are left and moestro reads "
                f"at most {limit}"
            )
