"""Forward and backward of one expert bank on every back end, as a share of a dense layer of equal FLOPs.

Prints one table per precision: rows are shapes, columns back ends, entries dense time / bank time (1.00 is the
limit), each the median of interleaved repetitions in one process. Run it on a quiet machine:

    python benchmarks/kernels.py [--threads 2] [--repeat 15]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

import moestro
from moestro.experts import FeedForward
from moestro.kernels import all_backends

# name, width, hidden, experts, top_k, tokens
SHAPES = [
    ("first recipe", 192, 256, 16, 2, 4096),
    ("Mixtral / 4", 1024, 3584, 8, 2, 512),
    ("OLMoE / 2", 1024, 512, 64, 8, 512),
    ("few tokens", 192, 256, 16, 2, 32),
]
BACKENDS = [name for name in all_backends() if name != "auto"]


def step(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        y.float().square().mean().backward()

    return run


def interleaved(steps: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    """Median seconds of each step; every round runs each once, so that a busy neighbour hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(repeat + 2):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if n >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def measure(shape: tuple[str, int, int, int, int, int], dtype: torch.dtype, repeat: int) -> dict[str, float]:
    _, width, hidden, num_experts, k, tokens = shape
    x = torch.randn(tokens, width, requires_grad=True)
    steps = {"dense": step(FeedForward(width, hidden * k), x, dtype)}
    for name in BACKENDS:
        sizes = {"width": width, "hidden": hidden, "num_experts": num_experts, "top_k": k}
        steps[name] = step(moestro.build("mixtral", kernel=name, **sizes), x, dtype)
    seconds = interleaved(steps, repeat)
    return {name: seconds["dense"] / seconds[name] for name in BACKENDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} threads")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\nforward + backward, {dtype}: share of the dense layer's speed")
        print(f"{'shape':<16}{'tokens':>8}" + "".join(f"{name:>10}" for name in BACKENDS))
        for shape in SHAPES:
            ratios = measure(shape, dtype, arguments.repeat)
            print(
                f"{shape[0]:<16}{shape[5]:>8}" + "".join(f"{ratios[name]:>10.2f}" for name in BACKENDS), flush=True
            )


if __name__ == "__main__":
    main()
