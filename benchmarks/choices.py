"""Whether what the transport `measured` chooses is the fastest, and what the choosing costs.

    python benchmarks/choices.py [--rounds 9]

Two gloo processes of one thread each, on one machine. A layer of each sort is called once, which measures; then all
candidates take turns, forward and backward, and their medians say what should have been chosen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moestro.experts import MLP
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Mesh, MeshShape
from moestro.parallel.transports import Adaptive, Choice, Measured
from moestro.parallel.transports.measured import tutels_ways
from moestro.routing import SparseRouting

EXPERTS, TOP_K = 8, 2
LAYERS = {  # axis of two ranks, tokens of a rank, width, hidden size
    "slices, many rows of small experts": ("tensor", 4096, 256, 64),
    "slices, few rows of large experts": ("tensor", 64, 512, 2048),
    "experts apart, many rows of small experts": ("expert", 4096, 256, 64),
    "experts apart, many rows of large experts": ("expert", 2048, 256, 1024),
    "experts apart, few rows of large experts": ("expert", 64, 512, 2048),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, parser.parse_args().rounds), nprocs=2)


def _rank(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 0:
        print("| layer | chosen | by the fastest | by the slowest | choosing, steps |\n|---|---|---|---|---|")
    for name, sizes in LAYERS.items():
        line = _measure(*sizes, rounds)
        if rank == 0:
            print(f"| {name} | {line} |", flush=True)
    dist.destroy_process_group()


def _measure(axis: str, tokens: int, width: int, hidden: int, rounds: int) -> str:
    mesh, transport = Mesh(MeshShape(**{axis: 2})), Measured()
    bank = MLP(EXPERTS, width, hidden)
    place = mesh.experts.get_local_rank(axis)
    local = bank.slice(place, 2) if axis == "tensor" else bank.share(range(place * 4, place * 4 + 4))
    layer = ParallelExperts(local, mesh, transport=transport)
    index = torch.stack([(torch.arange(tokens) + k) % EXPERTS for k in range(TOP_K)], 1)
    routing = SparseRouting.from_choice(index, torch.full(index.shape, 0.5), EXPERTS)
    x = torch.randn(tokens, width, requires_grad=True)
    first = _step(layer, x, routing)
    (tried,) = transport.seconds.values()
    (chosen,) = transport.choices.values()
    candidates = {choice: Adaptive(tutels_ways()[choice.way], choice.degree) for choice in tried}
    seconds: dict[Choice, list[float]] = {choice: [] for choice in candidates}
    for _ in range(rounds):
        for choice, each in candidates.items():
            layer.transport = each
            seconds[choice].append(_step(layer, x, routing))
    median = {choice: statistics.median(each) for choice, each in seconds.items()}
    best, worst = min(median.values()), max(median.values())
    words = f"r={chosen.degree}" + (f", {chosen.way}" if chosen.degree else "")
    ratios = f"{median[chosen] / best:.2f} | {median[chosen] / worst:.2f}"
    return f"{words} of {len(tried)} | {ratios} | {first / median[chosen]:.0f}"


def _step(layer: ParallelExperts, x: Any, routing: SparseRouting) -> float:
    dist.barrier()
    began = time.perf_counter()
    layer.run(x, routing).sum().backward()
    dist.barrier()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
