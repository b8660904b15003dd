"""Where text comes from: files, folders, globs, jsonl, or what every Python carries."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS = ("code", "prose")
"""The domains of the default corpus."""

_TESTS = ("test", "tests", "idle_test")
_FOREIGN = ("site-packages", "dist-packages", "_bundled", "pydoc_data")  # the topics are read as prose
_JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """A text, the name that decides its split, its domain, and where a reader finds it."""

    text: bytes | str
    name: str
    domain: str = "text"
    source: str = ""

    @property
    def data(self) -> bytes:
        """The text as bytes, UTF-8 if it came as a string."""
        return self.text if isinstance(self.text, bytes) else utf8(self.text, self.where)

    @property
    def where(self) -> str:
        """What an error message calls this document."""
        return self.source or self.name


def utf8(text: str, where: str = "the text") -> bytes:
    """`text` as UTF-8; a lone surrogate, which no byte string can express, raises ValueError."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has the lone surrogate {text[error.start]!a} at character {error.start}, which UTF-8 "
            "cannot express; remove it or replace it by U+FFFD"
        ) from None


def read_documents(
    paths: Sequence[str | Path] | None = None, skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents of `paths` in a fixed order, or the default corpus if there are none.

    A file is one document (a `.jsonl` file: one per line, with `"text"` and optionally `"domain"`). A folder
    gives every file below it that is neither hidden nor binary (a NUL among its first 8192 bytes), whatever
    its suffix; a glob gives its matches likewise. A file named outright is taken as it is. The domain is the
    stem of a file, the name of a folder, and for a glob the name of the folder that holds the match.

    Args:
        paths: files, folders or globs.
        skipped: counts what was left out, by reason: hidden, binary, empty, duplicate.

    Raises:
        ValueError: a path that is missing, a glob that matches nothing, or a bad jsonl line.
    """
    skipped = Counter() if skipped is None else skipped
    for document in _user_documents(paths, skipped) if paths else default_documents():
        if document.text:
            yield document
        else:
            skipped["empty"] += 1


def default_documents() -> Iterator[Document]:
    """What every Python carries, in sorted order.

    "code" is the sources of the standard library, "prose" its help topics, licence and notes. Tests,
    installed packages and facts about the machine are left out.

    Raises:
        ValueError: this Python carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [path for path in _walk(root, Counter(), (*_TESTS, *_FOREIGN)) if _is_text_of_ours(path)]
    if not any(path.suffix == ".py" for path in sources):
        raise ValueError(f"this Python carries no sources in {root}; give text files, folders or globs instead")
    for path in sources:
        data = path.read_bytes()
        if data and _is_utf8(data):
            domain = "code" if path.suffix == ".py" else "prose"
            yield Document(data, f"python/{path.relative_to(root).as_posix()}", domain, str(path))
    yield from _topics()


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions put them in a package of their own
        return
    for name, text in sorted(topics.items()):
        yield Document(text, f"python-topics/{name}", "prose")


def _is_text_of_ours(path: Path) -> bool:
    """Whether a file of the standard library is source or prose, not a table or a fact about the machine."""
    machine = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
    return path.suffix in (".py", ".txt", ".rst") and not machine and not path.name.endswith("Grammar.txt")


def _user_documents(paths: Sequence[str | Path], skipped: Counter[str]) -> Iterator[Document]:
    seen: set[Path] = set()
    for path, name, domain in _files(paths, skipped):
        real = path.resolve()
        if real in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(real)
        if path.suffix.lower() in _JSONL:
            yield from _jsonl(path, name, domain)
        else:
            yield Document(path.read_bytes(), name, domain, str(path))


def _files(paths: Sequence[str | Path], skipped: Counter[str]) -> Iterator[tuple[Path, str, str]]:
    """(file, document name, domain) of every file that the paths stand for."""
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            yield from _folder(path, skipped)
        elif path.exists():
            yield path, path.name, path.stem
        elif glob.has_magic(str(given)):
            yield from _matches(path, skipped)
        else:
            raise ValueError(f"there is no file or folder {str(given)!r} (seen from {Path.cwd()}); check the path")


def _folder(folder: Path, skipped: Counter[str]) -> Iterator[tuple[Path, str, str]]:
    title = folder.resolve().name or "text"
    for path in _walk(folder, skipped):
        if not _is_binary(path, skipped):
            yield path, f"{title}/{path.relative_to(folder).as_posix()}", title


def _matches(pattern: Path, skipped: Counter[str]) -> Iterator[tuple[Path, str, str]]:
    found = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise ValueError(f"no file matches {str(pattern)!r} (seen from {Path.cwd()}); check the pattern")
    for path in files:
        if not _is_binary(path, skipped):
            title = path.resolve().parent.name or "text"
            yield path, f"{title}/{path.name}", title


def _walk(folder: Path, skipped: Counter[str], closed: Sequence[str] = ()) -> Iterator[Path]:
    """The visible files below a folder, sorted, except below `closed` folders; links are not followed."""
    closed = (*closed, "__pycache__")
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in closed)
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif path.is_file():
                yield path


def _is_binary(path: Path, skipped: Counter[str]) -> bool:
    with path.open("rb") as file:
        binary = b"\0" in file.read(8192)
    skipped["binary"] += binary
    return binary


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _jsonl(path: Path, name: str, domain: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                record = _record(line, where)
                yield Document(record["text"], f"{name}:{number}", record.get("domain") or domain, where)


def _record(line: bytes, where: str) -> dict[str, Any]:
    """One line of jsonl, checked."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} of the line is not UTF-8, which json must be") from None
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise ValueError(f"{where}: malformed json ({reason}); expected one object per line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: no "text"; expected an object such as {{"text": "...", "domain": "..."}}')
    if not isinstance(record.get("domain"), str | None):
        raise ValueError(f'{where}: "domain" is {record["domain"]!r}; expected a string, or no "domain"')
    return record
