"""Routing that mixes the parameters of experts instead of their outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moestro.routing.sparse import SparseRouting


@dataclass(frozen=True)
class MergeRouting:
    """Virtual experts, each a mixture of the real ones' parameters, and tokens routed to them.

        theta_v = sum_e mixture[v, e] theta_e,   y_t = f(x_t; theta_v(t))     Muqeeth et al. 2023, section 3

    Attributes:
        mixture: share of each expert in a virtual one, `[virtual, experts]`.
        rows: tokens -> virtual experts.
    """

    mixture: Tensor
    rows: SparseRouting

    @property
    def num_experts(self) -> int:
        """Number of real experts."""
        return self.mixture.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the call."""
        return self.rows.num_tokens

    @property
    def offsets(self) -> Tensor:
        """Rows of virtual expert v are `offsets[v]:offsets[v + 1]`, `[virtual + 1]`."""
        return self.rows.offsets

    def dispatch(self, x: Tensor) -> Tensor:
        """Rows for the virtual experts: `x [tokens, width]` -> `[pairs, width]`."""
        return self.rows.dispatch(x)

    def combine(self, rows: Tensor) -> Tensor:
        """Back to tokens: `rows [pairs, width]` -> `[tokens, width]`."""
        return self.rows.combine(rows)

    def load(self) -> Tensor:
        """Tokens per real expert, shared out by the mixture, `[experts]` float."""
        return self.rows.load().to(self.mixture.dtype) @ self.mixture

    def combine_matrix(self) -> Tensor:
        """Share of each real expert in each token's virtual one, `[tokens, experts]`."""
        return self.rows.combine_matrix().to(self.mixture.dtype) @ self.mixture

    def check(self) -> None:
        """Raise ValueError if the virtual experts and the rows disagree."""
        if self.rows.num_experts != len(self.mixture):
            raise ValueError(
                f"rows go to {self.rows.num_experts} virtual experts but mixture describes {len(self.mixture)}"
            )
        self.rows.check()
