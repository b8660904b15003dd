"""The files of a run: lines that only grow, and whole files that appear at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from moestro.train.durable import STAGED, write_file


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(path.name + STAGED)
    try:
        write_file(temporary, text.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or absent."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file; a torn last line, left by a crash, is not a record."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


class JsonLines:
    """A jsonl file of records with a `step`, one line each, flushed at once.

    Opened for a run that has done `step` steps, it forgets the lines past that step, which a run that is resumed
    from there will write again. Floats are written so that they read back bit for bit.

    Args:
        path: of the file.
        step: optimiser steps done.
        writes: whether this process writes the file; otherwise it reads what is there, and keeps its records.
    """

    def __init__(self, path: Path, step: int = 0, writes: bool = True):
        self.path, self.writes = path, writes
        self._open(step)

    def rewind(self, step: int) -> None:
        """Forget the lines past a step, in a run that goes back to it."""
        self.close()
        self._open(step)

    def _open(self, step: int) -> None:
        self.records = [record for record in read_lines(self.path) if record["step"] <= step]
        self._file: IO[str] | None = None
        if self.writes:
            write_whole(self.path, "".join(map(_line, self.records)))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
