"""Documents to a corpus: tokenised once, split by document, kept in a cache that knows its contents."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import xxhash

from moestro.data.documents import Document, read_documents
from moestro.data.tokenfile import TokenFile, sync_folder, write_tokens
from moestro.data.tokenizer import Tokenizer, open_tokenizer, train_bpe

SPLITS = ("train", "validation")
_CHUNK = 1 << 22
_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, ready for `Batches`."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer
    domains: list[str]
    fingerprint: str
    skipped: dict[str, int] = field(default_factory=dict)
    """Files left out, by reason: hidden, binary, empty, duplicate."""

    @property
    def counts(self) -> list[dict[str, str | int]]:
        """One row per split and domain: documents, tokens, bytes."""
        rows: list[dict[str, str | int]] = []
        for split, file in zip(SPLITS, (self.train, self.validation), strict=True):
            columns = file.counts(len(self.domains))
            for i, domain in enumerate(self.domains):
                row = {name: column[i] for name, column in columns.items()}
                rows.append({"split": split, "domain": domain, **row})
        return rows

    def describe(self) -> list[str]:
        """The counts, and what was skipped, as lines to print."""
        lines = [
            f"{row['split']} {row['domain']}: {row['documents']} documents, "
            f"{row['tokens']} tokens, {row['bytes']} bytes"
            for row in self.counts
        ]
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()) if count)
        return [*lines, f"skipped: {skipped}"] if skipped else lines


@dataclass(frozen=True)
class _Entry:
    """What the split and the fingerprint need to know of a document."""

    name: str
    domain: str
    size: int
    digest: str = ""


def prepare_corpus(
    paths: Sequence[str | Path] | None,
    tokenizer: Tokenizer | str | Path,
    cache_dir: str | Path,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Corpus:
    """Tokenise documents and split them, or open what an earlier call made of the same contents.

    The split is by document, in every domain alike: in the order of a seeded hash of their names, documents
    go to validation where that brings it nearer to its share of bytes; at least one does and at least one
    stays. The only document of a domain is cut in two, its end being validation.

    Args:
        paths: files, folders or globs; none = the default corpus (see `read_documents`).
        tokenizer: a tokenizer, what `open_tokenizer` takes, or "bpe:N" to train one of N ids on the
            training split.
        cache_dir: where token files are kept, in a folder named by the fingerprint of contents, tokenizer
            and split.
        validation_fraction: share of the bytes of every domain kept for validation, between 0 and 1.
        seed: of the split.

    Raises:
        ValueError: no text, a missing path, a bad jsonl line, bytes that BPE cannot read, a damaged cache.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}; it must lie between 0 and 1")
    chosen = _open(tokenizer)
    skipped: Counter[str] = Counter()
    entries = [_entry(document) for document in read_documents(paths, skipped)]
    if not entries:
        raise ValueError(f"there is no text in {_listed(paths)}{_reasons(skipped)}; give files that hold text")
    domains = _domains(entries)
    recipe = (_FORMAT, _identity(chosen), validation_fraction, seed, entries)
    fingerprint = xxhash.xxh3_128_hexdigest(repr(recipe).encode())
    folder = Path(cache_dir) / fingerprint
    if not folder.is_dir():
        plan = list(zip(entries, split_documents(entries, validation_fraction, seed), strict=True))
        _build(folder, lambda: read_documents(paths), plan, chosen, domains)
    train, validation = (TokenFile(folder / f"{split}.tokens") for split in SPLITS)
    return Corpus(train, validation, open_tokenizer(folder), domains, fingerprint, dict(skipped))


def split_documents(entries: Sequence[_Entry], fraction: float, seed: int) -> list[float]:
    """The share of each document that goes to training: 1, 0, or `1 - fraction` for a domain's only one."""
    shares = [1.0] * len(entries)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        groups[entry.domain].append(i)
    for group in groups.values():
        if len(group) == 1:
            shares[group[0]] = 1 - fraction
            continue
        group.sort(key=lambda i: (xxhash.xxh3_64_intdigest(repr((seed, entries[i].name)).encode()), i))
        for i in _chosen(group, [entry.size for entry in entries], fraction):
            shares[i] = 0.0
    return shares


def _chosen(group: list[int], sizes: list[int], fraction: float) -> list[int]:
    """The documents of a domain that go to validation."""
    missing = fraction * sum(sizes[i] for i in group)
    chosen = []
    for i in group:
        if abs(missing - sizes[i]) < missing:
            chosen.append(i)
            missing -= sizes[i]
    return chosen[: len(group) - 1] or [min(group, key=lambda i: sizes[i])]


def _open(tokenizer: Tokenizer | str | Path) -> Tokenizer | int:
    """A tokenizer, or the number of ids of one to be trained."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    kind, _, number = str(tokenizer).partition(":")
    if kind != "bpe":
        return open_tokenizer(tokenizer)
    if not number.isdecimal() or int(number) < 257:
        raise ValueError(f"tokenizer {str(tokenizer)!r}: expected bpe:N, N at least 257, such as bpe:4096")
    return int(number)


def _identity(tokenizer: Tokenizer | int) -> str:
    if isinstance(tokenizer, int):
        return f"bpe:{tokenizer}"
    return f"{tokenizer.backend().to_str()}/{tokenizer.eos_id}"


def _entry(document: Document) -> _Entry:
    data = document.data
    return _Entry(document.name, document.domain, len(data), xxhash.xxh3_128_hexdigest(data))


def _domains(entries: Iterable[_Entry]) -> list[str]:
    domains = sorted({entry.domain for entry in entries})
    if len(domains) > 256:
        raise ValueError(
            f"the corpus has {len(domains)} domains, at most 256 fit; give folders rather than single files"
        )
    return domains


def _build(
    folder: Path,
    read: Callable[[], Iterable[Document]],
    plan: Sequence[tuple[_Entry, float]],
    tokenizer: Tokenizer | int,
    domains: Sequence[str],
) -> None:
    """Fill the cache folder whole or not at all; of two who build it at once the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        if isinstance(tokenizer, int):
            tokenizer = train_bpe(_part(read(), plan, "train"), tokenizer)
        tokenizer.save(temporary)
        for split in SPLITS:
            encoded = _encoded(_part(read(), plan, split), tokenizer, domains)
            write_tokens(temporary / f"{split}.tokens", encoded, tokenizer.piece_bytes)
        _make_durable(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    folder.chmod(0o755)  # mkdtemp keeps it private
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _part(documents: Iterable[Document], plan: Sequence[tuple[_Entry, float]], split: str) -> Iterator[Document]:
    """The documents, or parts of documents, that belong to a split."""
    for document, planned in zip_longest(documents, plan):
        if document is None or planned is None or _entry(document) != planned[0]:
            where = document.where if document else "the text"
            raise ValueError(f"{where} changed while the corpus was prepared; prepare it again")
        data, share = document.data, planned[1]
        cut = _cut(data, share)
        part = data[:cut] if split == "train" else data[cut:]
        if part:
            yield Document(part, document.name, document.domain, document.where)


def _cut(data: bytes, share: float) -> int:
    """Where the training part ends: inside no UTF-8 character, and both parts get something if they can."""
    if share in (0.0, 1.0):
        return int(len(data) * share)
    cut = max(1, min(int(len(data) * share), len(data) - 1))
    near = range(cut, max(cut - 4, 0), -1)
    return next((i for i in near if i < len(data) and data[i] & 0xC0 != 0x80), cut)


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, domains: Sequence[str]
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(ids, domain, bytes) of every document, encoded a few megabytes at a time."""
    number = {domain: i for i, domain in enumerate(domains)}
    for chunk in _chunks(documents):
        for document, ids in zip(chunk, tokenizer.encode_documents(chunk), strict=True):
            yield ids, number[document.domain], len(document.data)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.data)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _listed(paths: Sequence[str | Path] | None) -> str:
    return ", ".join(str(path) for path in paths) if paths else "this Python's library"


def _reasons(skipped: Counter[str]) -> str:
    found = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    return f" (files left out: {found})" if found else ""
