"""Gradients of all ranks: who adds up with whom, and the norm of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 25_000_000  # numbers that travel at once


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, scale: float = 1.0) -> None:
    """Add up gradients over a group of ranks, then multiply them by `scale`.

    A parameter without a gradient counts as zero, unless it has none on any rank: then it stays without.
    """
    learned = [p for p in parameters if p.requires_grad]
    if not learned:
        return
    has = torch.tensor([p.grad is not None for p in learned], dtype=torch.uint8, device=learned[0].device)
    dist.all_reduce(has, dist.ReduceOp.MAX, group=group)
    present = [p for p, some in zip(learned, has.tolist(), strict=True) if some]
    for p in present:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for bucket in _buckets([p.grad for p in present if p.grad is not None]):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad) * scale)


def here(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank: of one that is sharded its share, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dense_squares(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> Tensor:
    """The sum of squares of gradients that are whole on every rank or sharded over the group, in float64."""
    both = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    whole, shares = map(squared_norm, both)
    if both[1]:
        dist.all_reduce(shares, group=group)
    return whole.to(shares.device) + shares


def squared_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The sum of squares of all gradients, in float64; of those sharded over ranks, of what is here."""
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    squares = [here(grad).double().square().sum() for grad in grads]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def _buckets(grads: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients of one dtype, in order, up to a bucket's size."""
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        bucket: list[Tensor] = []
        for grad in (grad for grad in grads if grad.dtype == dtype):
            if bucket and sum(each.numel() for each in bucket) + grad.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(grad)
        yield bucket
