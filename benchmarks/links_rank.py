"""One rank of `links.py`: times one layer's forward pass with every transport, in turns; or writes what it does."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.experts import CopyExperts
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Mesh, MeshShape, Transport, make_transport
from moestro.parallel.transports import Chunked
from moestro.parallel.wire import Asked, Wire
from moestro.routing import SparseRouting


@dataclass(frozen=True)
class Case:
    """One regime.

    Attributes:
        name: of the regime.
        tokens: of each rank.
        seconds: that the experts of a rank take for all their rows; they sleep, so that overlap is what is
            measured, and not arithmetic of many processes on few cores.
        latency: seconds that a rank's sender spends on each message to another node.
        transports: `linear` first; `chunked 4` has four chunks.
    """

    name: str
    tokens: int
    seconds: float
    latency: float
    transports: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What all regimes share."""

    ranks: int = 4
    per_node: int = 2
    width: int = 512
    top_k: int = 4
    experts: int = 8


class Sleeping(CopyExperts):
    """Experts that return their rows after a while, so long for each of them."""

    per_row = 0.0
    slept: Callable[[float], None] = time.sleep

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        if len(rows):
            type(self).slept(self.per_row * len(rows))
        return rows


class Tape:
    """Writes down what a rank starts, waits for and computes, as `links_model` reads it."""

    def __init__(self) -> None:
        self.actions: list[dict[str, Any]] = []
        self._started = 0

    def ask(self, wire: Wire, each: int, receive: Sequence[int]) -> None:
        group = dist.get_process_group_ranks(wire.group)
        self.actions.append({"ask": [n * each for n in receive], "group": group})

    def start(self, wire: Wire, each: int, send: Sequence[int], receive: Sequence[int], asked: bool) -> int:
        group = dist.get_process_group_ranks(wire.group)
        sizes = [[n * each for n in rows] for rows in (send, receive)]
        self.actions.append({"group": group, "send": sizes[0], "receive": sizes[1], "asked": asked})
        self._started += 1
        return self._started - 1


def slow_sender(latency: float) -> None:
    """From now on every message to another node takes its rank's sender a while, in the order of the exchanges."""
    sender, plain = ThreadPoolExecutor(1), Wire.start

    def start(wire: Wire, rows: Tensor, send: Sequence[int], *rest: Any, **more: Any) -> Callable[[], Tensor]:
        far = sum(bool(n) and link == "inter" for n, link in zip(send, wire.links, strict=True))

        def later() -> Callable[[], Tensor]:
            time.sleep(latency * far)
            return plain(wire, rows, send, *rest, **more)

        going = sender.submit(later)
        return lambda: going.result()()

    Wire.start = start  # type: ignore[method-assign,assignment]


def taped(tape: Tape) -> None:
    """From now on what happens is written down."""
    plain, plain_ask = Wire.start, Wire.ask
    inside = False  # an exchange that begins asks by itself

    def size(rows: Tensor) -> int:
        return rows.element_size() * rows.shape[1:].numel()

    def ask(wire: Wire, like: Tensor, receive: Sequence[int], exact: bool = False) -> Asked:
        if not inside:
            tape.ask(wire, size(like), receive)
        return plain_ask(wire, like, receive, exact)

    def start(
        wire: Wire, rows: Tensor, send: Sequence[int], receive: Sequence[int], *rest: Any, **more: Any
    ) -> Callable[[], Tensor]:
        nonlocal inside
        number = tape.start(wire, size(rows), send, receive, more.get("asked") is not None)
        inside = True
        wait = plain(wire, rows, send, receive, *rest, **more)
        inside = False

        def waited() -> Tensor:
            tape.actions.append({"wait": number})
            return wait()

        return waited

    Wire.start, Wire.ask = start, ask  # type: ignore[method-assign,assignment]
    Sleeping.slept = lambda seconds: tape.actions.append({"seconds": seconds})


def transport_of(words: str) -> str | Transport:
    name, *chunks = words.split()
    return Chunked(int(chunks[0])) if chunks else make_transport(name)


def bank_of(words: str, case: Case, sizes: Sizes, mesh: Mesh) -> ParallelExperts:
    local = Sleeping(sizes.experts // sizes.ranks, sizes.width)
    local.per_row = case.seconds / (case.tokens * sizes.top_k)
    return ParallelExperts(local, mesh, transport=transport_of(words))


def work(rank: int, folder: Path) -> None:
    """Do what the file `job.json` says."""
    job = json.loads((folder / "job.json").read_text())
    case, sizes = Case(**job["case"]), Sizes(**job["sizes"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=sizes.ranks,
        timeout=timedelta(seconds=120),
    )
    mesh = Mesh(MeshShape(expert=sizes.ranks), ranks_per_node=sizes.per_node)
    banks = {words: bank_of(words, case, sizes, mesh) for words in case.transports}
    x = torch.randn(case.tokens, sizes.width)
    choice = torch.arange(sizes.top_k) * (sizes.experts // sizes.top_k + 1)  # as many for every expert, spread out
    index = (choice + torch.arange(case.tokens).unsqueeze(1)) % sizes.experts
    routing = SparseRouting.from_choice(index, torch.ones(index.shape), sizes.experts)
    found: dict[str, Any] = {}
    if job["tape"]:
        tape = Tape()
        taped(tape)
    elif case.latency:
        slow_sender(case.latency)
    with torch.no_grad():
        for turn in range(job["warm_up"] + job["repeat"]):
            for words, bank in banks.items():
                dist.barrier()
                began = time.perf_counter()
                bank.run(x, routing)
                seconds = time.perf_counter() - began
                if job["tape"]:
                    found[words], tape.actions[:] = list(tape.actions), []
                    tape._started = 0
                elif turn >= job["warm_up"]:
                    found.setdefault(words, []).append(seconds)
    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process when the one that started it does, however it does: then the pipe to it is closed."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    work(int(sys.argv[1]), Path(sys.argv[2]))
