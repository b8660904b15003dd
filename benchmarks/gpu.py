"""The Triton kernels on a GPU: whether they are right there, then what they are worth. No GPU was at hand so far.

First every activation, with and without biases, in every dtype and tile setting, odd sizes and empty experts:
outputs and all gradients against float64 on the same device, and the same bits twice. `error` is the largest
difference as a share of the largest value. If that fails, nothing is timed and the command fails.

Then forward and backward in bfloat16, routing included (index and weight to `SparseRouting`), medians by CUDA
events of steps that take turns. `of_dense` is dense time / our time, dense being the faster of two layers of equal
FLOPs; `over_x` is x's time / our time; `GiB` is the most memory that our step adds. On a device the table goes to
`benchmarks/results/`. Peers that run out of memory are named and left out.

    python benchmarks/gpu.py                       all of it: Mixtral and OLMoE, 512 to 65,536 tokens
    python benchmarks/gpu.py --sweep               and each tile setting for itself
    python benchmarks/gpu.py --interpret --tiny    no GPU: a minute in Triton's interpreter, times mean nothing
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from unittest.mock import patch

import torch
from all import keep
from harness import Report, parse, peer
from limits import Shape, bank, dense_layers, routed, transformers_experts
from torch import Tensor

from moestro.experts import ACTIVATIONS, make_experts
from moestro.routing import SparseRouting

SHAPES = (Shape("Mixtral", 4096, 14336, 8, 2), Shape("OLMoE", 2048, 1024, 64, 8))
TINY = (Shape("tiny", 32, 32, 4, 2),)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
Step = Callable[[], object]


@contextmanager
def tiles(setting: str | None) -> Iterator[None]:
    """Run with a tile setting instead of the one that the number of rows asks for."""
    from moestro.kernels.triton import settings

    if setting is None:
        yield
        return
    with patch.object(settings, "setting_for", lambda pairs, num_experts: setting):
        yield


def settings_to_try(tiny: bool) -> list[str]:
    from moestro.kernels.triton.settings import SETTINGS

    return ["some"] if tiny else list(SETTINGS)


def step_of(run: Callable[[], Tensor], upstream: Tensor, tensors: list[Tensor]) -> Step:
    def step() -> None:
        for each in tensors:
            each.grad = None
        run().backward(upstream)

    return step


def worst_error(activation: str, bias: bool, dtype: torch.dtype, setting: str, tokens: int) -> tuple[float, bool]:
    """The largest relative error of outputs and gradients against float64, and whether the bits repeat."""
    experts = make_experts(9, 57, 131, activation, bias, "triton").to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    exact = make_experts(9, 57, 131, activation, bias, "loop").double()
    exact.load_state_dict(experts.state_dict())
    x, weight = torch.randn(tokens, 57).to(dtype), torch.rand(tokens, 2)
    index = torch.rand(tokens, 7).topk(2).indices  # two experts stay without rows
    upstream = torch.randn(tokens, 57).to(dtype)

    def run(layer: torch.nn.Module, real: torch.dtype) -> list[Tensor]:
        inputs = [x.to(real).requires_grad_(), weight.to(real if real == torch.float64 else weight.dtype)]
        inputs[1].requires_grad_()
        y = layer.run(inputs[0], SparseRouting.from_choice(index, inputs[1], 9))
        found = torch.autograd.grad(y, [*inputs, *layer.parameters()], upstream.to(real))
        return [each.detach() for each in (y, *found)]

    with tiles(setting):
        found, again = run(experts, dtype), run(experts, dtype)
    expected = run(exact, torch.float64)
    pairs = zip(found, expected, strict=True)
    error = max(float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    return error, all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def check(report: Report, tiny: bool) -> bool:
    """One row per dtype and activation; whether all are right."""
    right = True
    for dtype, tolerance in TOLERANCE.items():
        for activation in ("swiglu", "relu") if tiny else ACTIVATIONS:
            cases = [
                worst_error(activation, bias, dtype, setting, tokens)
                for bias in ([True] if tiny else [False, True])
                for setting in settings_to_try(tiny)
                for tokens in ([11] if tiny else [1, 300, 5000])
            ]
            error, repeats = max(error for error, _ in cases), all(same for _, same in cases)
            fine = error < tolerance and repeats
            report.add(
                dtype=str(dtype).removeprefix("torch."),
                activation=activation,
                error=error,
                allowed=tolerance,
                repeats=repeats,
                right=fine,
            )
            right = right and fine
    return right


def milliseconds(steps: dict[str, Step], repeat: int, warm_up: int) -> dict[str, float]:
    """Medians of steps that take turns: by CUDA events on a device, by the clock on a CPU."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + repeat):
        for name, step in steps.items():
            took = device_time(step) if torch.cuda.is_available() else clock_time(step)
            if number >= warm_up:
                times[name].append(took)
    return {name: median(each) for name, each in times.items()}


def device_time(step: Step) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def clock_time(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def added_memory(step: Step) -> float | None:
    """GiB that a step adds to what is there, at its peak."""
    if not torch.cuda.is_available():
        return None
    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


class Contest:
    """The steps that compete on one shape and number of tokens."""

    def __init__(self, shape: Shape, tokens: int, with_peer: bool) -> None:
        self.x = torch.randn(tokens, shape.width).bfloat16().requires_grad_()
        self.upstream = torch.randn(tokens, shape.width).bfloat16()
        index, weight, _ = routed(shape, tokens)
        self.steps: dict[str, Step] = {}
        for name, (layer, parameters) in dense_layers(shape, torch.bfloat16).items():
            if name != "a fused bank of one":  # that runs on a CPU only
                self.add(f"dense: {name}", lambda layer=layer: layer(self.x), parameters)
        for kernel in ("triton", "native"):
            ours = bank(shape, torch.bfloat16, kernel)
            self.add(
                kernel,
                lambda ours=ours: ours.run(self.x, SparseRouting.from_choice(index, weight, shape.num_experts)),
                list(ours.parameters()),
            )
        for path in ("grouped_mm", "eager") if with_peer else ():
            theirs, parameters = transformers_experts(shape, ours, path)
            theirs.to(self.x.device)
            low = weight.bfloat16()
            self.add(path, lambda theirs=theirs, low=low: theirs(self.x, index, low), parameters)

    def add(self, name: str, run: Callable[[], Tensor], parameters: list[Tensor]) -> None:
        step = step_of(run, self.upstream, [self.x, *parameters])
        try:
            step()
        except torch.OutOfMemoryError:
            print(f"{name} runs out of memory: its figures are left out", flush=True)
            torch.cuda.empty_cache()
        else:
            self.steps[name] = step


def measure(shape: Shape, tokens: int, arguments: argparse.Namespace, report: Report, with_peer: bool) -> None:
    contest = Contest(shape, tokens, with_peer)
    for setting in [None, *(settings_to_try(arguments.tiny) if arguments.sweep else [])]:
        with tiles(setting):
            found = milliseconds(contest.steps, arguments.repeat, 1 if arguments.tiny else 3)
            memory = added_memory(contest.steps["triton"])
        over = {name: took / found["triton"] for name, took in found.items()}
        report.add(
            shape=shape.name,
            tokens=tokens,
            tiles=setting or "auto",
            ms=found["triton"],
            of_dense=min((value for name, value in over.items() if name.startswith("dense")), default=None),
            over_grouped_mm=over.get("native"),
            over_transformers=over.get("grouped_mm"),
            over_eager=over.get("eager"),
            GiB=memory,
        )


def main() -> int:
    arguments = parse(
        __doc__, repeat=9, tokens="512,2048,16384,65536", shapes="Mixtral,OLMoE",
        interpret=False, tiny=False, sweep=False,
    )  # fmt: skip
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which has not happened yet
    elif not torch.cuda.is_available():
        print("no GPU: run with --interpret --tiny to see that the kernels work at all", file=sys.stderr)
        return 1
    shapes = TINY if arguments.tiny else [s for s in SHAPES if s.name in arguments.shapes.split(",")]
    report = Report("gpu", arguments)
    with torch.device("cpu" if arguments.interpret else "cuda"):
        if not check(report, arguments.tiny):
            print("the kernels are wrong on this device: nothing is timed", file=sys.stderr)
            report.finish()
            return 1
        with_peer = peer("transformers") is not None
        for shape in shapes:
            for tokens in [8] if arguments.tiny else map(int, arguments.tokens.split(",")):
                measure(shape, tokens, arguments, report, with_peer)
    report.finish()
    if not arguments.interpret:
        keep([report.document()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
