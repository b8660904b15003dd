"""Tokens on disk: one memory-mapped file with its domains, documents and checksum."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

MAGIC = b"MOESTROT"
VERSION = 1
# magic, version, bytes per token, tokens, documents, ids in the vocabulary; then the checksum
_FIELDS = struct.Struct("<8sIIQQQ")
_HEADER = _FIELDS.size + 16
_CHUNK = 1 << 24
_MEND = "delete the folder {} and prepare the corpus again"


@dataclass(frozen=True)
class _Layout:
    """Which bytes of the file hold what; every section starts at a multiple of 8."""

    width: int
    tokens: int
    documents: int
    vocab: int

    def sections(self) -> dict[str, tuple[int, np.dtype, int]]:
        """name -> (offset, dtype, count)."""
        kinds = (
            ("tokens", f"<u{self.width}", self.tokens),
            ("domains", "<u1", self.tokens),
            ("offsets", "<i8", self.documents + 1),
            ("document_bytes", "<i8", self.documents),
            ("piece_bytes", "<i4", self.vocab),
        )
        found, offset = {}, _HEADER
        for name, dtype, count in kinds:
            found[name] = (offset, np.dtype(dtype), count)
            offset = _aligned(offset + count * np.dtype(dtype).itemsize)
        return found

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        offset, dtype, count = self.sections()["piece_bytes"]
        return _aligned(offset + count * dtype.itemsize)


class TokenFile:
    """A sequence of documents as tokens, memory-mapped and read-only.

    Args:
        path: a file written by `write_tokens`.
        verify: compare the checksum (xxh3, 128 bits) of the whole file.

    Attributes:
        tokens: [tokens] uint8, uint16 or uint32.
        domains: the domain of every token, [tokens] uint8.
        offsets: document d is tokens offsets[d] to offsets[d + 1], [documents + 1] int64.
        document_bytes: bytes of text in every document, [documents] int64.
        piece_bytes: bytes of text that each id stands for, [vocab] int32.

    Raises:
        ValueError: a file that is missing, foreign, truncated or changed.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        layout = _read_layout(self.path)
        self._map = np.memmap(self.path, dtype=np.uint8, mode="r")
        if verify:
            self._verify()
        views = {name: self._view(*section) for name, section in layout.sections().items()}
        self.tokens, self.domains, self.offsets = views["tokens"], views["domains"], views["offsets"]
        self.document_bytes, self.piece_bytes = views["document_bytes"], views["piece_bytes"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}: {len(self)} tokens, {self.num_documents} documents)"

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of text that the tokens represent."""
        return int(self.document_bytes.sum())

    def counts(self, num_domains: int) -> dict[str, list[int]]:
        """Documents, tokens and bytes of every domain."""
        domain = self.domains[self.offsets[:-1]]

        def total(weight: np.ndarray | None) -> list[int]:
            return [int(n) for n in np.bincount(domain, weight, minlength=num_domains)]

        tokens, sizes = np.diff(self.offsets), self.document_bytes
        return {"documents": total(None), "tokens": total(tokens), "bytes": total(sizes)}

    def _view(self, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
        return np.asarray(self._map[offset : offset + count * dtype.itemsize]).view(dtype)

    def _verify(self) -> None:
        state = xxhash.xxh3_128(bytes(self._map[: _FIELDS.size]))
        for start in range(_HEADER, len(self._map), _CHUNK):
            state.update(self._map[start : start + _CHUNK].data)
        if state.digest() != bytes(self._map[_FIELDS.size : _HEADER]):
            raise ValueError(f"{self.path} is damaged (its checksum differs); {_MEND.format(self.path.parent)}")


def write_tokens(
    path: str | Path, documents: Iterable[tuple[np.ndarray, int, int]], piece_bytes: np.ndarray
) -> TokenFile:
    """Write a token file whole or not at all, and open it.

    Args:
        path: where; a file already there is replaced.
        documents: (token ids, domain, bytes of text) of each; a document without tokens is left out.
        piece_bytes: bytes of text that each id stands for, [vocab].
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            _write(file, documents, piece_bytes)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return TokenFile(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integers that hold every id."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def _write(file: BinaryIO, documents: Iterable[tuple[np.ndarray, int, int]], piece_bytes: np.ndarray) -> None:
    """The tokens are streamed; the domain of a token follows from its document and is written afterwards."""
    dtype = token_dtype(len(piece_bytes))
    lengths, domains, sizes = [], [], []
    file.write(b"\0" * _HEADER)
    for ids, domain, size in documents:
        if len(ids):
            file.write(ids.astype(dtype, copy=False).tobytes())
            lengths.append(len(ids))
            domains.append(domain)
            sizes.append(size)
    _pad(file)
    for domain, length in zip(domains, lengths, strict=True):
        file.write(bytes([domain]) * length)
    _pad(file)
    for array, kind in ((np.cumsum([0, *lengths]), "<i8"), (np.array(sizes), "<i8"), (piece_bytes, "<i4")):
        file.write(array.astype(kind).tobytes())
        _pad(file)
    header = _FIELDS.pack(MAGIC, VERSION, dtype.itemsize, sum(lengths), len(lengths), len(piece_bytes))
    digest = _digest(file, header)
    file.seek(0)
    file.write(header + digest)


def _digest(file: BinaryIO, header: bytes) -> bytes:
    state = xxhash.xxh3_128(header)
    file.seek(_HEADER)
    while chunk := file.read(_CHUNK):
        state.update(chunk)
    return state.digest()


def _read_layout(path: Path) -> _Layout:
    """The layout that the header tells, checked against the size of the file before anything is mapped."""
    if not path.is_file():
        raise ValueError(f"there is no token file {path}; {_MEND.format(path.parent)}")
    with path.open("rb") as file:
        head = file.read(_HEADER)
    if len(head) < _HEADER or head[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} does not begin like a token file; {_MEND.format(path.parent)}")
    _, version, width, *counts = _FIELDS.unpack_from(head)
    if version != VERSION or width not in (1, 2, 4):
        raise ValueError(f"{path} has format {version}, expected {VERSION}; {_MEND.format(path.parent)}")
    layout, size = _Layout(width, *counts), path.stat().st_size
    if size != layout.size:
        raise ValueError(f"{path} has {size} bytes, expected {layout.size}; {_MEND.format(path.parent)}")
    return layout


def _aligned(offset: int) -> int:
    return -(-offset // 8) * 8


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
