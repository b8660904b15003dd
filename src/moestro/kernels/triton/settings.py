"""Tile sizes, and which of them serves how many rows. None of this has been measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """How a product is cut up.

    Attributes:
        rows: rows of a tile; of an expert's rows the last tile is partly empty.
        columns: columns of a tile.
        depth_bytes: bytes of a row that are loaded at a time, see `depth`.
        group: row tiles that go through the columns together, so that these are read once.
        warps: of a program.
        stages: loads under way while a product runs, where the shared memory has room for them.
        programs: of one multiprocessor at a time.
    """

    rows: int
    columns: int
    depth_bytes: int
    group: int
    warps: int
    stages: int
    programs: int

    def depth(self, dtype: torch.dtype) -> int:
        """Elements of a row that are loaded at a time: half in float32, whose products hold them in registers."""
        return self.depth_bytes // (8 if dtype == torch.float32 else dtype.itemsize)

    @property
    def narrow(self) -> int:
        """Columns of a tile where a kernel does so much with each that more would not fit into its registers."""
        return min(self.columns, 64)

    def columns_of(self, dtype: torch.dtype) -> int:
        """Columns of a tile of this dtype: float32 products, outside the tensor cores, need more registers."""
        return self.narrow if dtype == torch.float32 else self.columns

    def shared_bytes(self, stages: int) -> int:
        """Shared memory of the greediest kernel: rows of one matrix and columns of two, per stage."""
        return stages * (self.rows + 2 * self.columns) * self.depth_bytes

    def stages_within(self, shared: int) -> int:
        """The stages for which a multiprocessor with so many bytes of shared memory has room, at least one."""
        return max((n for n in range(1, self.stages + 1) if self.shared_bytes(n) <= shared), default=1)


SETTINGS = {
    "few": Setting(rows=16, columns=64, depth_bytes=128, group=4, warps=4, stages=4, programs=4),
    "some": Setting(rows=64, columns=128, depth_bytes=128, group=8, warps=4, stages=3, programs=2),
    "many": Setting(rows=128, columns=128, depth_bytes=128, group=8, warps=8, stages=3, programs=1),
}


def setting_for(pairs: int, num_experts: int) -> str:
    """The name of the setting for so many rows over so many experts: tiles as large as an even load fills.

    `few` below 32 rows an expert, `some` below 128, `many` from there on.
    """
    mean = pairs / max(num_experts, 1)
    return "few" if mean < 32 else "some" if mean < 128 else "many"


def most_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """A bound on the row tiles that does not depend on who chose whom."""
    return (pairs + min(pairs, num_experts) * (rows - 1)) // rows
