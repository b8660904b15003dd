"""Move the experts of a folder from one layout to another, bit for bit, one expert in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moestro.hf.layouts.bank import MARK, Bank, find_banks, natural_key
from moestro.hf.layouts.folder import StockFolder
from moestro.hf.layouts.forms import Slot
from moestro.hf.layouts.header import ITEM_SIZES
from moestro.hf.layouts.table import Family, Store, find_family
from moestro.hf.layouts.writer import NewTensor, ShardWriter

Progress = Callable[[int, int], None]
PIECE = 16_000_000


class Relayout:
    """A conversion worked out and checked, but not begun.

    Args:
        folder: the source.
        to: the layout wanted; see `moestro.hf.layouts.LAYOUTS`.

    Attributes:
        source: the layout of the folder.
        to: the layout wanted.
        family: row of the table.
        tensors: everything that will be written.

    Raises:
        ValueError: an unsupported model, an incomplete folder or a layout that this family does not have.
    """

    def __init__(self, folder: StockFolder, to: str):
        self.folder, self.to = folder, to
        self.family = find_family(folder.model_type, folder.tensors)
        self.source, self._banks = find_banks(folder, self.family)
        self._new_banks = [bank.within(_store(self.family, to)) for bank in self._banks]
        self._renamed = beside_names(folder, self.family, self._banks, to)
        self.tensors = sorted([*self._kept(), *self._experts()], key=lambda tensor: natural_key(tensor.name))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def config(self) -> dict[str, Any]:
        """config.json of the result, marked if its layout is one that transformers does not have."""
        config = {key: value for key, value in self.folder.config.items() if key != MARK}
        return config if self.to in self.family.opens else config | {MARK: self.to}

    def write(self, target: Path, max_shard_size: int, progress: Progress) -> None:
        """Write everything into an empty folder."""
        write_json(target / "config.json", self.config())
        copy_beside(self.folder, target)
        with ShardWriter(target, self.tensors, max_shard_size) as writer:
            done = 0
            for step in (self._copy_kept, self._copy_experts):
                for count in step(writer):
                    done += count
                    progress(done, self.nbytes)

    def _kept(self) -> list[NewTensor]:
        entries = self.folder.tensors
        return [NewTensor(new, entries[old].dtype, entries[old].shape) for old, new in self._renamed.items()]

    def _experts(self) -> list[NewTensor]:
        slots = [(bank, slot) for bank in self._new_banks for slot in bank.store.form]
        return [tensor for bank, slot in slots for tensor in new_tensors(bank, slot)]

    def _copy_kept(self, writer: ShardWriter) -> Iterator[int]:
        for old, new in self._renamed.items():
            nbytes = self.folder.tensors[old].nbytes
            for start in range(0, nbytes, PIECE):
                count = min(PIECE, nbytes - start)
                writer.write(new, self.folder.read_raw(old, start, count), start)
                yield count

    def _copy_experts(self, writer: ShardWriter) -> Iterator[int]:
        for bank, new in zip(self._banks, self._new_banks, strict=True):
            for expert in bank.experts:
                yield write_expert(writer, new, expert, bank.read(self.folder, expert))


def beside_names(folder: StockFolder, family: Family, banks: list[Bank], to: str) -> dict[str, str]:
    """Names in another layout of everything in a folder that is no expert."""
    store = _store(family, to)
    names: dict[str, str] = {}
    for bank in banks:
        old, new = bank.layer + bank.store.block, bank.layer + store.block
        names |= {name: new + name[len(old) :] for name in folder.tensors if name.startswith(old)}
        before = (bank.store.router, *bank.store.beside)
        after = (store.router, *store.beside)
        pairs = zip(before, after, strict=True)
        names |= {old + first: new + second for first, second in pairs if old + first in folder.tensors}
    experts = {name for bank in banks for name in bank.names()}
    return {name: names.get(name, name) for name in folder.tensors if name not in experts}


def new_tensors(bank: Bank, slot: Slot) -> list[NewTensor]:
    """What a slot of a bank will be on disk.

    Raises:
        ValueError: the slot joins matrices of different dtypes.
    """
    dtypes = {bank.dtypes[matrix] for matrix in slot.holds}
    names = bank.tensors(slot)
    if len(dtypes) > 1:
        kinds = " and ".join(sorted(dtypes))
        raise ValueError(f"{names[0]} would join matrices of {kinds}; store them in one dtype")
    shape = slot.shape(bank.shapes)
    shape = (bank.count(slot), *shape) if slot.stacked else shape
    return [NewTensor(name, dtypes.copy().pop(), shape) for name in names]


def write_expert(writer: ShardWriter, bank: Bank, expert: int, matrices: Mapping[str, np.ndarray]) -> int:
    """Write one expert's matrices where its bank keeps them; the number of bytes."""
    written = 0
    for slot in bank.store.form:
        if expert >= bank.count(slot):
            continue
        share = np.ascontiguousarray(slot.pack([matrices[matrix] for matrix in slot.holds]))
        names = bank.tensors(slot)
        name, start = (names[0], expert * share.nbytes) if slot.stacked else (names[expert], 0)
        assert share.itemsize == ITEM_SIZES[bank.dtypes[slot.holds[0]]]
        writer.write(name, share.reshape(-1).view(np.uint8).data, start)
        written += share.nbytes
    return written


def copy_beside(folder: StockFolder, target: Path) -> None:
    """Take tokenizer, generation settings, templates and the model card along."""
    for path in folder.beside():
        shutil.copyfile(path, target / path.name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _store(family: Family, to: str) -> Store:
    if to not in family.stores:
        raise ValueError(
            f"{family.model_type} has no {to} layout; it has {', '.join(family.stores)}, and moestro and gguf"
        )
    return family.stores[to]
