"""What a selection rule answers: which experts each token wants, in order of preference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores along the last dimension, largest first; ties go to the lowest index.

    `torch.topk` promises no order among equals (on a CPU the highest index wins), hence the stable sort.

    Shapes: scores `[..., experts]` -> `[..., k]` int64.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@dataclass(frozen=True)
class Selection:
    """The experts that each token chose.

    Attributes:
        index: experts in order of preference, `[tokens, k]` int64.
        keep: which choices count, `[tokens, k]` bool; None = all of them (static shapes, no synchronisation).
    """

    index: Tensor
    keep: Tensor | None = None

    @property
    def k(self) -> int:
        """Choices per token."""
        return self.index.shape[1]

    def restricted(self, keep: Tensor | None) -> Selection:
        """The same choices, of which only those also in `keep` (`[tokens, k]` or `[tokens, 1]` bool) count."""
        if keep is None:
            return self
        keep = keep.expand_as(self.index)
        return Selection(self.index, keep if self.keep is None else self.keep & keep)
