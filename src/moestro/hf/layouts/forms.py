"""The forms in which experts are stored: one by one or stacked, joined, transposed, interleaved.

An expert has a few matrices, here always `[out, in]` and called gate, up and down, and perhaps a bias for each.
A form says which tensors hold them and how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One tensor of the disk, or one per expert if `{expert}` is in its name, and what it holds.

    Attributes:
        name: below the module of the experts' layer.
        holds: one matrix or bias, or two of the same shape joined along their outputs.
        transposed: matrices are stored `[in, out]`.
        interleaved: outputs of the two alternate (gate 0, up 0, gate 1, ...) instead of following each other.
    """

    name: str
    holds: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.name

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """What one expert takes in this tensor, given the shapes of its matrices."""
        first, *rest = shapes[self.holds[0]]
        shape = (first * len(self.holds), *rest)
        return shape[::-1] if self.transposed else shape

    def pack(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """One expert's share of this tensor."""
        joined = parts[0] if len(parts) == 1 else self._join(parts)
        return joined.T if self.transposed else joined

    def unpack(self, share: np.ndarray) -> list[np.ndarray]:
        """The matrices in one expert's share, in the order of `holds`."""
        joined, count = (share.T if self.transposed else share), len(self.holds)
        if self.interleaved:
            return [joined[i::count] for i in range(count)]
        return np.split(joined, count)

    def _join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        if not self.interleaved:
            return np.concatenate(parts)
        return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


Form = tuple[Slot, ...]
ALL = ("gate", "up", "down")


def one_by_one(names: Mapping[str, str], *, biased: bool = False, folder: str = "experts.{expert}.") -> Form:
    """A tensor for each expert and matrix; `names` by matrix."""
    weights = [Slot(f"{folder}{name}.weight", (matrix,)) for matrix, name in names.items()]
    biases = [Slot(f"{folder}{name}.bias", (f"{matrix}_bias",)) for matrix, name in names.items()]
    return (*weights, *(biases if biased else []))


def stacked(
    *,
    gated: bool = True,
    biased: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
    names: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj"),
) -> Form:
    """All experts in one tensor: gate and up joined, and down."""
    first = ("gate", "up") if gated else ("up",)
    name = names[0] if gated else "experts.up_proj"
    weights = [Slot(name, first, transposed, interleaved), Slot(names[1], ("down",), transposed)]
    biases = [
        Slot(f"{name}_bias", tuple(f"{matrix}_bias" for matrix in first), interleaved=interleaved),
        Slot(f"{names[1]}_bias", ("down_bias",)),
    ]
    return (*weights, *(biases if biased else []))


def projections(*, gated: bool = True, biased: bool = False) -> Form:
    """gate_proj, up_proj and down_proj of each expert."""
    return one_by_one({m: f"{m}_proj" for m in (ALL if gated else ALL[1:])}, biased=biased)


def w1w2w3(*, gated: bool = True, biased: bool = False) -> Form:
    """w1 (gate), w3 (up) and w2 (down) of each expert, the names of Mixtral; without a gate w1 is up."""
    names = {"gate": "w1", "up": "w3", "down": "w2"} if gated else {"up": "w1", "down": "w2"}
    return one_by_one(names, biased=biased)
