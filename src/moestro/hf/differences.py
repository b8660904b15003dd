"""What differs between the weights of two model folders, read a matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.hf.layouts import StockFolder, find_banks, find_family
from moestro.hf.layouts.bank import Bank, natural_key
from moestro.hf.layouts.folder import INTEGERS
from moestro.hf.layouts.relayout import beside_names

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PIECE = 4_000_000
"""Bytes of a large tensor that are compared at once; a multiple of every item size."""
BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Pile:
    """The experts of one layer.

    Attributes:
        num_experts: those that compute.
        router: name of the router's matrix, or None if it is not known.
        read: the matrices of an expert, by name.
    """

    num_experts: int
    router: str | None
    read: Callable[[int], dict[str, Tensor]]


class Weights:
    """A folder's experts by layer and its other tensors by name, however the experts lie on disk.

    Args:
        folder: of a family of `moestro.hf.layouts`, or one that moestro saved.

    Attributes:
        piles: experts by layer, in model order.
        plain: where every other tensor lies: name in the layout `transformers` -> name on disk.

    Raises:
        ValueError: a dense or unknown model, or experts that are missing, doubled or mis-shaped.
    """

    def __init__(self, folder: StockFolder):
        self.folder = folder
        self.piles: dict[str, Pile] = {}
        self.plain = {name: name for name in folder.tensors}
        if folder.model_type == "moestro":
            self._find_own()
        else:
            self._find_stock()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor that is no expert's, flat, one piece after another."""
        entry = self.folder.tensors[self.plain[name]]
        for start in range(0, entry.nbytes, PIECE):
            raw = self.folder.read_raw(self.plain[name], start, min(PIECE, entry.nbytes - start))
            yield _values(np.frombuffer(raw, INTEGERS[entry.item_size]), entry.dtype)

    def shape(self, name: str) -> list[int]:
        return list(self.folder.tensors[self.plain[name]].shape)

    def dtype(self, name: str) -> str:
        return self.folder.tensors[self.plain[name]].dtype

    def _find_stock(self) -> None:
        family = find_family(self.folder.model_type, self.folder.tensors)
        _, banks = find_banks(self.folder, family)
        stored = beside_names(self.folder, family, banks, "transformers")
        self.plain = {new: old for old, new in stored.items()}
        store = family.stores["transformers"]
        for bank in banks:
            router = bank.layer + store.block + store.router
            self.piles[bank.layer.rstrip(".")] = Pile(bank.num_experts, router, self._reader(bank))

    def _reader(self, bank: Bank) -> Callable[[int], dict[str, Tensor]]:
        def read(expert: int) -> dict[str, Tensor]:
            return {name: _values(bits, bank.dtypes[name]) for name, bits in bank.read(self.folder, expert).items()}

        return read

    def _find_own(self) -> None:
        """Stacked experts of our own layouts; experts that are modules of their own stay plain tensors."""
        stacks: dict[str, dict[str, str]] = {}
        for name, entry in self.folder.tensors.items():
            layer, middle, matrix = name.rpartition(".experts.")
            if middle and "." not in matrix and len(entry.shape) >= 3:
                stacks.setdefault(layer, {})[matrix] = name
        for layer, names in sorted(stacks.items(), key=lambda item: natural_key(item[0])):
            counts = {self.folder.tensors[name].shape[0] for name in names.values()}
            if len(counts) == 1:
                self.piles[layer] = Pile(count := counts.pop(), self._own_router(layer, count), self._slices(names))
                for name in names.values():
                    del self.plain[name]

    def _slices(self, names: Mapping[str, str]) -> Callable[[int], dict[str, Tensor]]:
        def read(expert: int) -> dict[str, Tensor]:
            entries = {matrix: self.folder.tensors[name] for matrix, name in names.items()}
            return {
                matrix: _values(self.folder.read(name, expert), entries[matrix].dtype)
                for matrix, name in names.items()
            }

        return read

    def _own_router(self, layer: str, num_experts: int) -> str | None:
        found = [
            name
            for name, entry in self.folder.tensors.items()
            if name.startswith(f"{layer}.router.") and len(entry.shape) == 2 and entry.shape[0] == num_experts
        ]
        return found[0] if len(found) == 1 else None


def weight_differences(
    a: str | Path, b: str | Path, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Compare two folders of one architecture, whatever the layouts of their experts.

    Distances are relative, `|b - a| / |a|` in the Euclidean norm; None where a is zero or something is not finite.

    Args:
        a, b: the folders.
        progress: called with a few words now and then.

    Returns: `layers`, by name `experts` (`distance` and `cosine` per expert over all its matrices, `by_matrix`:
        distance per expert) and `router` (`distance`, `cosine`, `rows`: distance per expert, `bias`: largest change
        of the selection bias); `tensors`, what differs in the rest: `only_in_a`, `only_in_b`, `other_shape` (name
        and both shapes), `other_dtype` (name and both), `changed` (name and distance, largest first), `equal` (how
        many).

    Raises:
        ValueError: a folder that cannot be read, or two architectures, layers or numbers of experts.
    """
    with StockFolder(a) as first, StockFolder(b) as second:
        one, other = Weights(first), Weights(second)
        check_comparable(one, other)
        layers = {}
        for number, name in enumerate(one.piles, 1):
            progress(f"weights of layer {number} of {len(one.piles)}")
            layers[name] = {
                "experts": _experts(one.piles[name], other.piles[name]),
                "router": _router(name, one, other),
            }
        progress("other tensors")
        return {"layers": layers, "tensors": _tensors(one, other)}


def check_comparable(one: Weights, other: Weights) -> None:
    """Raise ValueError for two models whose experts have nothing to do with each other."""
    a, b = one.folder, other.folder
    if a.model_type != b.model_type:
        raise ValueError(
            f"{a.path} is a {a.model_type} model and {b.path} a {b.model_type} model: their experts cannot be "
            "compared; pass two models of one architecture"
        )
    missing = sorted(one.piles.keys() ^ other.piles.keys(), key=natural_key)
    if missing:
        where = a.path if missing[0] in one.piles else b.path
        raise ValueError(f"only {where} has experts in {missing[0]}; pass models with the same mixture layers")
    for name, pile in one.piles.items():
        if pile.num_experts != other.piles[name].num_experts:
            raise ValueError(
                f"{name} has {pile.num_experts} experts in {a.path} and {other.piles[name].num_experts} in "
                f"{b.path}: "
                "nothing says which expert of one is which of the other"
            )


def _experts(one: Pile, other: Pile) -> dict[str, Any] | None:
    """None where experts have other sizes."""
    sums: list[dict[str, list[float]]] = []
    for expert in range(one.num_experts):
        pair = one.read(expert), other.read(expert)
        if {name: each.shape for name, each in pair[0].items()} != {n: each.shape for n, each in pair[1].items()}:
            return None
        sums.append({name: _sums(pair[0][name].flatten(), pair[1][name].flatten()) for name in pair[0]})
    whole = [[sum(column) for column in zip(*of.values(), strict=True)] for of in sums]
    return {
        "distance": [_distance(of) for of in whole],
        "cosine": [_cosine(of) for of in whole],
        "by_matrix": {name: [_distance(of[name]) for of in sums] for name in sums[0]},
    }


def _router(layer: str, one: Weights, other: Weights) -> dict[str, Any] | None:
    name, same = one.piles[layer].router, other.piles[layer].router
    if name is None or name != same or name not in one.plain or one.shape(name) != other.shape(name):
        return None
    width = one.shape(name)[1]
    a, b = (torch.cat(list(weights.pieces(name))).view(-1, width) for weights in (one, other))
    rows = [_sums(x, y) for x, y in zip(a, b, strict=True)]
    whole = [sum(column) for column in zip(*rows, strict=True)]
    return {
        "distance": _distance(whole),
        "cosine": _cosine(whole),
        "rows": [_distance(row) for row in rows],
        "bias": _bias(layer, one, other),
    }


def _bias(layer: str, one: Weights, other: Weights) -> float | None:
    """The largest change of the selection bias of a layer; None without one."""
    names = [name for name in one.plain if name.startswith(f"{layer}.") and name.rpartition(".")[2] in BIASES]
    if len(names) != 1 or names[0] not in other.plain or one.shape(names[0]) != other.shape(names[0]):
        return None
    a, b = (torch.cat(list(weights.pieces(names[0]))) for weights in (one, other))
    return float((b - a).abs().max())


def _tensors(one: Weights, other: Weights) -> dict[str, Any]:
    routers = {pile.router for weights in (one, other) for pile in weights.piles.values()}
    first, second = (weights.plain.keys() - routers for weights in (one, other))
    shared = sorted(first & second, key=natural_key)
    shapes = {name: (one.shape(name), other.shape(name)) for name in shared}
    dtypes = {name: (one.dtype(name), other.dtype(name)) for name in shared}
    alike = [name for name, (a, b) in shapes.items() if a == b]
    distances = {name: _distance(_total(one, other, name)) for name in alike}
    changed = [(name, value) for name, value in distances.items() if value != 0]
    return {
        "only_in_a": sorted(first - second, key=natural_key),
        "only_in_b": sorted(second - first, key=natural_key),
        "other_shape": [[name, a, b] for name, (a, b) in shapes.items() if a != b],
        "other_dtype": [[name, a, b] for name, (a, b) in dtypes.items() if a != b],
        "changed": sorted(map(list, changed), key=lambda pair: -math.inf if pair[1] is None else -pair[1]),
        "equal": len(alike) - len(changed),
    }


def _total(one: Weights, other: Weights, name: str) -> list[float]:
    """Tensors of two dtypes come in pieces of other lengths, so they are joined first."""
    if one.dtype(name) != other.dtype(name):
        return _sums(torch.cat(list(one.pieces(name))), torch.cat(list(other.pieces(name))))
    sums = [_sums(x, y) for x, y in zip(one.pieces(name), other.pieces(name), strict=True)]
    return [sum(column) for column in zip(*sums, strict=True)]


def _sums(a: Tensor, b: Tensor) -> list[float]:
    """|b - a|^2, <a, b>, |a|^2, |b|^2."""
    return [_dot(b - a, b - a), _dot(a, b), _dot(a, a), _dot(b, b)]


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _distance(sums: list[float]) -> float | None:
    moved, _, length, _ = sums or [0.0] * 4
    if moved == 0:
        return 0.0
    return _finite(math.sqrt(moved / length)) if length else None


def _cosine(sums: list[float]) -> float | None:
    _, product, a, b = sums
    return _finite(product / math.sqrt(a * b)) if a and b else None


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _values(bits: np.ndarray, dtype: str) -> Tensor:
    """Bits as float32, or float64 where the tensor has that."""
    flat = torch.from_numpy(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))
    if dtype not in DTYPES:
        raise ValueError(f"moestro compares {', '.join(DTYPES)}, not {dtype}")
    values = flat.view(DTYPES[dtype]).reshape(bits.shape)
    return values if dtype == "F64" else values.float()
