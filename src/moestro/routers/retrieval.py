"""Memory in front of a router: prototypes that an embedding calls up."""

from __future__ import annotations

from torch import Tensor, nn


class Retrieval(nn.Module):
    """One step of a modern Hopfield network.

        m = softmax(beta q K') V        Ramsauer et al. 2020, eq. 3; used by Dat et al. 2023 (HOMOE)

    Args:
        keys: stored patterns `[prototypes, width]`, learnable.
        values: what they call up `[prototypes, width]`; default: the keys.
        beta: sharpness; 0 answers the mean of the values, a large one the nearest.

    Raises:
        ValueError: a negative beta, or keys and values that do not pair.

    Shapes: `[..., width]` -> `[..., width]`.
    """

    def __init__(self, keys: Tensor, values: Tensor | None = None, beta: float = 1.0) -> None:
        super().__init__()
        values = keys if values is None else values
        if beta < 0 or len(keys) != len(values):
            raise ValueError(
                f"beta={beta} must not be negative, and {len(keys)} keys need as many values, not {len(values)}"
            )
        self.keys, self.values, self.beta = nn.Parameter(keys.clone()), nn.Parameter(values.clone()), beta

    def forward(self, query: Tensor) -> Tensor:
        return (self.beta * query @ self.keys.t()).softmax(-1) @ self.values
