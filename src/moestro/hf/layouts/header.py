"""Reading the header of a safetensors file, believing nothing that the file says about itself.

The safetensors library takes a name twice (the last wins), shapes of any length and, mapped into memory, a file
that is cut while it is read. Headers are therefore checked here and data read with `pread`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: bytes of one element; formats that pack several elements into a byte are not taken apart
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        path: its file.
        dtype: as the format calls it, for example BF16.
        shape: sizes.
        start: first byte in the file.
        nbytes: bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.dtype]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: the file is cut, too long, or its header is not what the format allows.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is no whole safetensors file: its header would take {length} of {size} bytes; "
                "download it again"
            )
        text = file.read(length)
    fields = _parse(text, path)
    fields.pop("__metadata__", None)
    if len(fields) > MAX_TENSORS:
        raise ValueError(f"{path} lists {len(fields)} tensors; moestro reads at most {MAX_TENSORS}")
    entries = {name: _entry(name, value, path, 8 + length) for name, value in fields.items()}
    _check_extent(entries.values(), path, 8 + length, size)
    return entries


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON whose objects name nothing twice.

    Raises:
        ValueError: not JSON, nested too deep, or a key given twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in found if names.count(name) > 1)
            raise ValueError(f"{where} names {double!r} twice; restore the file")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); restore the file") from None


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    fields = parse_json(text, f"the header of {path}")
    if not isinstance(fields, dict):
        raise ValueError(f"the header of {path} is not a table of tensors; restore the file")
    return fields


def _entry(name: str, value: Any, path: Path, data: int) -> Entry:
    where = f"tensor {name!r} in {path}"
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where} lacks dtype, shape or data_offsets; restore the file") from None
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{where} has dtype {dtype!r}; moestro moves {', '.join(ITEM_SIZES)}")
    if not _sizes(shape) or not _sizes([start, end]) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"{where} has an impossible shape or place; expected at most {MAX_DIMENSIONS} whole numbers"
        )
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if end - start != nbytes:
        raise ValueError(f"{where} of shape {shape} and dtype {dtype} needs {nbytes} bytes, not {end - start}")
    return Entry(path, dtype, tuple(shape), data + start, nbytes)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_extent(entries: Iterable[Entry], path: Path, data: int, size: int) -> None:
    """Tensors must follow each other without holes or overlaps and end where the file ends."""
    place = data
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != place:
            raise ValueError(f"the tensors of {path} overlap or leave holes; restore the file")
        place += entry.nbytes
    if place != size:
        raise ValueError(
            f"{path} has {size} bytes but its header promises {place}; it was cut or is still being "
            "downloaded, fetch it again"
        )


def read_bytes(descriptor: int, start: int, nbytes: int, path: Path) -> bytearray:
    """Exactly `nbytes` bytes; a file cut meanwhile is an error and not a crash."""
    buffer = bytearray(nbytes)
    view, done = memoryview(buffer), 0
    while done < nbytes:
        count = os.preadv(descriptor, [view[done : done + 2**30]], start + done)
        if count == 0:
            raise ValueError(f"{path} ended at byte {start + done}, while it was read; fetch it again")
        done += count
    return buffer
