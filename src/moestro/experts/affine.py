"""One affine map per expert and what follows it: the experts of classical mixtures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.experts.base import Experts
from moestro.experts.stacked import StackedLinear
from moestro.kernels.grouped import check_backend


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def softmax(x: Tensor) -> Tensor:
    """Softmax over the outputs of a row."""
    return x.softmax(-1)


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "softmax": softmax,
}


class AffineExperts(Experts):
    """A bank of generalised linear maps; what comes out may have another width than what goes in.

        f_e(x) = link(x W_e + b_e)        Jordan and Jacobs 1994, eq. 2; Eigen et al. 2013, eq. 1 (relu)

    Args:
        num_experts: number of experts.
        width: size of a row going in.
        out_width: size of a row coming out.
        link: `identity`, `relu`, `tanh`, `exp` (counts, positive targets) or `softmax` (class probabilities).
        kernel: back end of the grouped product, see `moestro.kernels`.

    Parameters: weight `[experts, width, out_width]` from normal(0, 1/sqrt(width)), bias `[experts, out_width]`
    zero.

    Raises:
        ValueError: an unknown link.
    """

    def __init__(
        self, num_experts: int, width: int, out_width: int, link: str = "identity", kernel: str = "auto"
    ) -> None:
        super().__init__()
        if link not in LINKS:
            raise ValueError(f"unknown link {link!r}; choose one of {', '.join(LINKS)}")
        self.num_experts, self.width = num_experts, width
        self.link, self.kernel = link, check_backend(kernel)
        self.weight = nn.Parameter(torch.empty(num_experts, width, out_width))
        self.bias = nn.Parameter(torch.empty(num_experts, out_width))
        StackedLinear.initialise(self, None)

    @property
    def out_width(self) -> int:
        return self.weight.shape[2]

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return LINKS[self.link](StackedLinear(offsets, self.kernel)(rows, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, width={self.width}, out_width={self.out_width}, link={self.link!r}"
