"""Whether the numbers that an optimiser step builds on are finite, looked at in little time.

What takes part in a step shows in its loss or gradient norm, which are looked at anyway: activations, gradients and
every weight that a token met. What does not show is the optimiser's state, which only the update reads, and buffers
that decide without being multiplied. Weights that no token met do no harm, but should not lie there until one does.

Looking at a number costs reading it from memory. A dot product of the two moments of a parameter is finite unless a
number in them is not, or huge ones overflow, and reads both in one call; only where a product is not finite every
number is looked at itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moestro.parallel.gradients import here

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # their sums overflow


class Soundness:
    """Looks at the optimiser's state and the saved buffers at every step, at each weight once in `every` steps.

    Buffers that held an infinite number from the start, such as a mask, are left alone.

    Args:
        model: whose buffers are looked at.
        optimiser: whose parameters and their state are looked at.
        every: 1 = all weights at every step; 0 = nothing at all.
    """

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, every: int = 1):
        self.optimiser, self.every = optimiser, every
        self._places, self._flat = list[int](), list[tuple[Tensor, Tensor]]()
        self._buffers = {
            f"{path}.{name}".lstrip("."): (module, name)
            for path, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
            and buffer.is_floating_point()
            and not buffer.isinf().any()
        }

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that are looked at, by name."""
        return {path: getattr(module, name) for path, (module, name) in self._buffers.items()}

    @torch.no_grad()
    def __call__(self, step: int) -> bool:
        """Whether all that is looked at in a step is finite."""
        if not self.every:
            return True
        alone = [*self._weights(step % self.every), *self.buffers().values()]
        pairs = [*self._moments(), *((each, each) for each in alone)]
        if not pairs or math.isfinite(torch.stack([_product(*pair) for pair in pairs]).sum()):
            return True
        return all(bool(tensor.isfinite().all()) for pair in pairs for tensor in pair)

    def _weights(self, turn: int) -> Iterator[Tensor]:
        """Those whose turn it is: as many bytes in each."""
        parameters = self._shares()
        sizes = [parameter.numel() for parameter in parameters]
        share, before = max(sum(sizes), 1), 0
        for parameter, size in zip(parameters, sizes, strict=True):
            if before * self.every // share == turn:
                yield parameter
            before += size

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def _shares(self) -> list[Tensor]:
        return [here(parameter).detach() for parameter in self._parameters()]

    def _moments(self) -> list[tuple[Tensor, Tensor]]:
        """The optimiser's state two by two, flat; looking it up anew is a good part of the time of a look."""
        of = self.optimiser.state
        state = [v for p in self._parameters() for v in of.get(p, {}).values() if torch.is_tensor(v) and v.ndim]
        state = list(map(here, state))
        places = [tensor.data_ptr() for tensor in state]
        if places != self._places:
            self._places, self._flat = places, list(_two_by_two(list(map(_flat, state))))
        return self._flat


def _two_by_two(tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbours that match together, others alone."""
    while tensors:
        one = tensors.pop(0)
        match = tensors and tensors[0].shape == one.shape and tensors[0].dtype == one.dtype
        yield one, tensors.pop(0) if match else one


def _flat(tensor: Tensor) -> Tensor:
    """A view of its memory; what has none stays as it is."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def _product(one: Tensor, other: Tensor) -> Tensor:
    """A number that is not finite if one of theirs is not, and hardly otherwise."""
    wider = _WIDER.get(one.dtype)
    if wider is not None:
        return one.sum(dtype=wider) + other.sum(dtype=wider)
    return torch.dot(one.flatten(), other.flatten()).float()
