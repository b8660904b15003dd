"""Peak memory of activations, forward and backward: the fused bank, other kernels, dense layers of equal FLOPs.

Counts every allocation that torch's profiler sees in the calling thread from the start of forward to the end of
backward, except those of a whole parameter's size: the gradients of weights. Token counts are such that no
activation has that size. The bank's other threads work in memory that the caller allocated; only the copies of
small experts' weights are their own. `of_dense` is against the leanest dense layer, `of_plain_dense` against three
products under autograd; both have routing indices taken off the bank's side.

    python benchmarks/memory.py [--tokens 520,4104]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Report, parse
from limits import SHAPES, bank, dense_layers, routed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], but: set[int]) -> int:
    """The most bytes alive at once that the step itself allocated, leaving out allocations of the sizes `but`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and abs(event.nbytes()) not in but
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def activations(layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> int:
    upstream = torch.randn_like(x)

    def step() -> None:
        layer(x).backward(upstream)

    step()
    for each in (x, *parameters):
        each.grad = None
    return peak_bytes(step, {each.nbytes for each in parameters})


def main() -> None:
    report = Report("memory", parse(__doc__, tokens="520,4104"))
    for shape in (each for each in SHAPES if each.name != "Qwen3-30B-A3B"):
        for tokens in map(int, report.arguments.tokens.split(",")):
            x = torch.randn(tokens, shape.width).bfloat16().requires_grad_()
            dense = {n: activations(f, x, p) for n, (f, p) in dense_layers(shape, torch.bfloat16).items()}
            _, _, routing = routed(shape, tokens)
            found = {}
            for name in ("fused", "fused, recompute", "tiled", "native", "loop"):
                experts = bank(shape, torch.bfloat16, name.split(",")[0])
                experts.recompute = "recompute" in name
                found[name] = activations(
                    lambda each, experts=experts, routing=routing: experts.run(each, routing),
                    x,
                    list(experts.parameters()),
                )
            indices = 8 * sum(t.numel() for t in (routing.token, routing.weight, routing.offsets)) * 2
            for name, size in found.items():
                report.add(
                    shape=shape.name,
                    tokens=tokens,
                    kernel=name,
                    megabytes=size / 1e6,
                    of_dense=(size - indices) / min(dense.values()),
                    of_plain_dense=(size - indices) / dense["three products"],
                )
    report.finish()


if __name__ == "__main__":
    main()
