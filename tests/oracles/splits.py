"""Splits of one batch into micro-batches, and what training on each way leaves in a model."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moestro.balance import RoutingLog
from moestro.balance.totals import Layers
from moestro.layers import MoE
from moestro.routing import Context

WIDTH, LENGTH, BATCH = 6, 5, 64
SPLITS: dict[str, Sequence[int]] = {
    "4 x 16": [16] * 4,
    "ragged": [1, 30, 4, 17, 12],
    "one by one": [1] * 64,
}


class Tower(nn.Module):
    """Two layers with residuals: the loss of the second one also reaches the router of the first."""

    def __init__(self, make: Callable[[], MoE], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(make() for _ in range(2)).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, context)
        return x


def samples(seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """64 sequences with random padding; sequence 0 and the last 12 (a ragged micro-batch) are all padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    valid = torch.rand(BATCH, LENGTH, generator=generator) < 0.7
    valid[0] = valid[-12:] = False
    shape = (BATCH, LENGTH)
    facts = {
        "token_ids": torch.randint(11, shape, generator=generator),
        "domain": torch.randint(2, (BATCH, 1), generator=generator).expand(shape),
        "device": torch.randint(2, shape, generator=generator),
        "sequence": torch.arange(BATCH).unsqueeze(1).expand(shape),
        "position": torch.arange(LENGTH).expand(shape),
    }
    return x, valid, facts


def micro_batches(
    model: Tower, split: Sequence[int], dtype: torch.dtype = torch.float64
) -> list[Callable[[], Tensor]]:
    """The model on so many sequences each."""
    x, valid, facts = samples()
    passes, begin = [], 0
    for size in split:
        rows = slice(begin, begin + size)
        known = {name: fact[rows].flatten() for name, fact in facts.items()}
        passes.append(partial(model, x[rows].to(dtype), Context(valid=valid[rows].flatten(), **known)))
        begin += size
    return passes


def learn(
    model: Tower, split: Sequence[int], layers: Layers = "sum"
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Gradients of the router parameters, the auxiliary loss, and the buffers after the controllers' turn.

    One big batch goes without a first pass: its loss is the ordinary one.
    """
    log, passes = RoutingLog(model, layers=layers), micro_batches(model, split)
    totals = log.first_pass(passes) if len(passes) > 1 else None
    value = torch.zeros((), dtype=torch.float64)
    for run in passes:
        with log.recording():
            run()
        part = log.auxiliary_loss(totals)
        if part.requires_grad:
            part.backward()
        value = value + part.detach()
    log.update_controllers()
    log.close()
    grads = {
        f"{n}.{name}": torch.zeros_like(p) if p.grad is None else p.grad
        for n, layer in enumerate(model.layers)
        for name, p in layer.router.named_parameters()
    }
    return grads, value, {name: buffer.clone() for name, buffer in model.named_buffers()}
