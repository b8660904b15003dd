"""Tensors by pieces: what one process holds of a whole model, and how pieces are named and put together again.

model.layers.3.moe.experts.gate             a whole tensor
model.layers.3.moe.experts.gate[17]         expert 17 of it, whichever process holds it
model.layers.3.moe.experts.gate[17]{1of2@1} the second of two slices of that along its dimension 1
model.embedding.weight{64:128}              rows 64 to 127 of a tensor that is sharded
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moestro.experts.parallel import ParallelExperts, parallel_banks
from moestro.layers import MoE
from moestro.parallel.gradients import here

_PIECE = re.compile(
    r"(?P<name>.+?)(?:\[(?P<row>\d+)\](?:\{\d+of(?P<parts>\d+)@(?P<dim>\d+)\})?|\{(?P<first>\d+):(?P<end>\d+)\})?"
)


class Cut(NamedTuple):
    """One of several slices along a dimension."""

    dim: int
    part: int
    parts: int


class Span(NamedTuple):
    """A run of rows, the last not included."""

    first: int
    end: int


@dataclass(frozen=True)
class Fragment:
    """What a process holds of one tensor of the whole model.

    Attributes:
        name: of the whole model's tensor.
        tensor: of this process.
        row: the row of the whole tensor; None = all of it.
        place: the row of `tensor` that holds it; None = all of it.
        cut: which slice of the row.
        of_expert: whether it is of an expert, so that other processes hold others.
        counts: whether, of the slots that hold this expert, this is the first.
        leads: whether this process is the first of those that hold the experts between them.
        span: rows of the whole tensor that `tensor`, which is sharded, has here; None = it is not sharded.
    """

    name: str
    tensor: Tensor
    row: int | None = None
    place: int | None = None
    cut: Cut | None = None
    of_expert: bool = False
    counts: bool = True
    leads: bool = True
    span: Span | None = None

    @property
    def key(self) -> str:
        """The name of the piece."""
        return piece_name(self.name, self.row, self.cut, self.span)

    def of(self, tensor: Tensor) -> Tensor:
        """The piece in a tensor like ours, a view; a single number is of all pieces."""
        tensor = here(tensor)
        return tensor if self.place is None or not tensor.ndim else tensor[self.place]


def piece_name(name: str, row: int | None, cut: Cut | None = None, span: Span | None = None) -> str:
    """See the head of this module."""
    if span is not None:
        return f"{name}{{{span.first}:{span.end}}}"
    if row is None:
        return name
    return f"{name}[{row}]" if cut is None else f"{name}[{row}]{{{cut.part}of{cut.parts}@{cut.dim}}}"


def whole_name(piece: str) -> str:
    """The tensor that a piece is of."""
    return _parsed(piece)["name"]


def _parsed(piece: str) -> dict[str, str]:
    match = _PIECE.fullmatch(piece)
    assert match is not None
    return match.groupdict()


class Origin(NamedTuple):
    """Where an expert's parameter is in the whole model."""

    name: str
    row: int | None
    shape: torch.Size


Origins = dict[str, list[dict[str, Origin]]]
"""By name of a bank, for each of its experts: its parameters by the names that they have in every expert."""


def origins_of(model: nn.Module) -> Origins:
    """Where the parameters of every expert are, before the model is spread."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: Origins = {}

    def note(path: str) -> None:
        bank = model.get_submodule(path)
        found[path] = [
            {
                inner: Origin(names[id(p)], row, p.shape if row is None else p.shape[1:])
                for inner, (p, row) in bank.parameters_of(expert).items()  # type: ignore[operator]
            }
            for expert in range(bank.num_experts)  # type: ignore[arg-type]
        ]

    for name, module in model.named_modules():
        if isinstance(module, MoE):
            for inner, each in module.experts.named_modules(prefix=f"{name}.experts"):
                if hasattr(each, "parameters_of"):
                    note(inner)
    return found


def fragments_of(model: nn.Module, origins: Origins) -> list[Fragment]:
    """Everything that this process holds.

    Args:
        model: perhaps spread.
        origins: of the model before that.
    """
    banks = dict(parallel_banks(model))
    of_banks = {id(p) for bank in banks.values() for p in bank.local.parameters()}
    dense = ((name, tensor) for name, tensor in model_tensors(model).items() if id(tensor) not in of_banks)
    found = [Fragment(name, tensor, span=_span(tensor)) for name, tensor in dense]
    for path, bank in banks.items():
        found += _of_bank(bank, origins[path])
    return found


def _of_bank(bank: ParallelExperts, origins: Sequence[Mapping[str, Origin]]) -> Iterator[Fragment]:
    mesh, placement = bank.network.mesh, bank.placement
    rank, part = mesh.experts.get_local_rank("expert"), mesh.experts.get_local_rank("tensor")
    for place, expert in enumerate(placement.experts_of(rank)):
        counts = placement.slots_of(expert)[0] == rank * placement.slots_per_rank + place
        for inner, (parameter, row) in bank.local.parameters_of(place).items():
            origin = origins[expert][inner]
            held = parameter if row is None else parameter[row]
            cut = _cut(held, origin.shape, part, mesh.shape.tensor)
            leads = rank == part == 0
            yield Fragment(origin.name, parameter, origin.row, row, cut, True, counts, leads)


def _span(tensor: Tensor) -> Span | None:
    """The rows of a sharded tensor that are here: FSDP2 gives equal runs, and the last ranks what is left."""
    if not isinstance(tensor, DTensor):
        return None
    mesh, rows = tensor.device_mesh, len(tensor)
    each = -(-rows // mesh.size())
    first = min(each * mesh.get_local_rank(), rows)
    span = Span(first, min(first + each, rows))
    assert len(here(tensor)) == span.end - span.first
    return span


def _cut(held: Tensor, whole: torch.Size, part: int, parts: int) -> Cut | None:
    dims = [dim for dim, size in enumerate(whole) if held.shape[dim] != size]
    return Cut(dims[0], part, parts) if dims else None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (each once, also when tied) and the buffers that are part of the state."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


class Pieces:
    """Tensors saved whole or in pieces, read whole or in pieces.

    Args:
        tensors: by the names of pieces.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self._rows: dict[str, dict[int, list[str]]] = {}
        self._spans: dict[str, list[Span]] = {}
        for piece in tensors:
            parsed = _parsed(piece)
            rows = self._rows.setdefault(parsed["name"], {})
            if parsed["first"] is not None:
                self._spans.setdefault(parsed["name"], []).append(Span(int(parsed["first"]), int(parsed["end"])))
            if parsed["row"] is not None:
                rows.setdefault(int(parsed["row"]), []).append(piece)

    @property
    def names(self) -> set[str]:
        """Of whole tensors."""
        return set(self._rows)

    def in_rows(self, name: str) -> bool:
        """Whether a tensor was saved row by row."""
        return bool(self._rows.get(name))

    def in_spans(self, name: str) -> bool:
        """Whether a tensor was saved in runs of rows."""
        return name in self._spans

    def num_rows(self, name: str) -> int:
        """Rows of a tensor that was saved in runs of rows or row by row; those that are missing count, too."""
        last = max((span.end for span in self._spans.get(name, [])), default=0)
        return max(max(self._rows[name], default=-1) + 1, last)

    def read(
        self, name: str, row: int | None = None, cut: Cut | None = None, span: Span | None = None
    ) -> Tensor | None:
        """A tensor or a piece of it, or None where nothing was saved.

        Raises:
            KeyError: a piece of it is missing; names the piece.
        """
        if name not in self._rows:
            return None
        if row is None:
            if name in self._spans:
                return self._rows_of_spans(name, span or Span(0, self.num_rows(name)))
            if not self.in_rows(name):
                return self.tensors[name] if span is None else self.tensors[name][span.first : span.end]
            return torch.stack([self._row(name, each) for each in range(self.num_rows(name))])
        whole = self._row(name, row) if self.in_rows(name) else _row_of(self.tensors, name, row)
        return whole if cut is None else whole.chunk(cut.parts, cut.dim)[cut.part]

    def _rows_of_spans(self, name: str, wanted: Span) -> Tensor:
        """Some rows, put together of the runs that hold them."""
        parts, at = [], wanted.first
        for span in sorted(self._spans[name]):
            if span.first <= at < min(span.end, wanted.end):
                end = min(span.end, wanted.end)
                parts.append(self.tensors[piece_name(name, None, span=span)][at - span.first : end - span.first])
                at = end
        if at < wanted.end:
            raise KeyError(piece_name(name, None, span=Span(at, wanted.end)))
        if not parts:  # no rows at all, of the right width
            span = self._spans[name][0]
            return self.tensors[piece_name(name, None, span=span)][:0]
        return torch.cat(parts)

    def _row(self, name: str, row: int) -> Tensor:
        pieces = self._rows[name].get(row, [])
        if not pieces:
            raise KeyError(piece_name(name, row))
        sliced = _parsed(pieces[0])
        if sliced["parts"] is None:
            return self.tensors[pieces[0]]
        dim, parts = int(sliced["dim"]), int(sliced["parts"])
        return torch.cat([self.tensors[piece_name(name, row, Cut(dim, part, parts))] for part in range(parts)], dim)


def _row_of(tensors: Mapping[str, Tensor], name: str, row: int) -> Tensor:
    read = getattr(tensors, "row", None)  # a file is not read whole for the sake of one row
    value: Tensor = tensors[name][row] if read is None else read(name, row)
    return value
