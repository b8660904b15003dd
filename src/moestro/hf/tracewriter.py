"""Writing down routing while a model runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moestro.hf.decisions import Heard
from moestro.hf.families import FoundLayer
from moestro.hf.traces import (
    WEIGHT_DTYPE,
    Fingerprint,
    Trace,
    join_pieces,
    nested,
    side_of,
    write_index,
    write_part,
)

PART_BYTES = 64 * 2**20


class TraceWriter:
    """Collects choices and, if there is a folder, writes them in parts of 64 MiB while the model runs.

    Args:
        model: that is recorded.
        found: its layers.
        draft: folder to write parts into, or None to keep everything in memory.
        final: name that the folder will have.
    """

    def __init__(
        self, model: nn.Module, found: Mapping[str, FoundLayer], draft: Path | None, final: Path | None
    ) -> None:
        self.trace = Trace(Fingerprint.of(model, found), folder=final)
        self._draft = draft
        self._pieces: dict[str, list[Tensor]] = {}
        self._bytes, self._parts = 0, list[str]()
        self._leaders = {side_of(name): name for name in reversed(list(found))}  # first layer of each side

    @torch.no_grad()
    def add(self, heard: Heard) -> None:
        """Write down one call of one router."""
        reading, tokens, name = heard.reading(), heard.tokens, heard.layer.name
        few = reading.logits.shape[1] <= 256
        pieces = {
            f"{name}/index": reading.index.to(torch.uint8 if few else torch.int16),
            f"{name}/weight": reading.weight.to(WEIGHT_DTYPE),
        }
        if reading.keep is not None:
            pieces[f"{name}/keep"] = reading.keep
        if self._leaders[side_of(name)] == name and tokens.ids is not None:
            pieces[f"{side_of(name)}/ids"] = tokens.ids.int()
        for key, piece in pieces.items():
            piece = piece if tokens.valid is None else _rows(piece, tokens.valid)
            self._pieces.setdefault(key, []).append(piece.cpu())
            self._bytes += piece.nbytes
        if self._draft is not None and self._bytes > PART_BYTES:
            self._flush()

    def finish(self) -> None:
        """Complete the trace, in memory or in the draft."""
        if self._draft is None:
            joined = {key: join_pieces(pieces) for key, pieces in self._pieces.items()}
            self.trace.layers, self.trace.ids = nested(joined)
            return
        self._flush()
        write_index(self._draft, self.trace.fingerprint, self._parts)

    def _flush(self) -> None:
        assert self._draft is not None
        if self._pieces:
            joined = {key: join_pieces(pieces) for key, pieces in self._pieces.items()}
            self._parts.append(write_part(self._draft, len(self._parts), joined))
        self._pieces, self._bytes = {}, 0


def _rows(piece: Tensor, valid: Tensor) -> Tensor:
    if piece.dtype == WEIGHT_DTYPE:  # torch cannot index float8
        return piece.view(torch.uint8)[valid].view(WEIGHT_DTYPE)
    return piece[valid]
