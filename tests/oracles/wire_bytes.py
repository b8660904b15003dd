"""What each transport must send, written out from who chose what; and what it did send, on real ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from moestro.experts import MLP
from moestro.experts.parallel import ParallelExperts
from moestro.parallel import Mesh, MeshShape, Network
from moestro.parallel.transports import DropCopies, Pairwise, Shadow, StaticCapacity, make_transport
from moestro.routing import SparseRouting

WIDTH, HIDDEN = 6, 5
Bytes = Counter[tuple[str, str, str]]  # by (name, phase, link)


def choices(case: dict[str, Any]) -> list[list[list[int]]]:
    """The experts that each token of each rank chose: with a bias, evenly, or all the same."""
    ranks, experts, k = case["ranks"], case["experts"], case["top_k"]
    generator = torch.Generator().manual_seed(3)
    found = []
    for rank in range(ranks):
        if case["load"] == "even":  # every rank sends as many rows to every expert
            found.append([[(t * k + j) % experts for j in range(k)] for t in range(case["tokens"])])
            continue
        tokens = 0 if rank == 1 and case["load"] == "uneven" else case["tokens"] + rank
        tilt = torch.arange(experts) * (0.5 if case["load"] == "uneven" else 0)
        scores = torch.rand(tokens, experts, generator=generator) * 4 - tilt
        found.append(scores.topk(k).indices.tolist())
    return found


def measure(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes and messages that this rank sent, forward and backward."""
    meshes: dict[tuple[int, int], Mesh] = {}
    answers = []
    for case in cases:
        key = (case["per_node"], case.get("copies", 1))
        if key not in meshes:
            meshes[key] = Mesh(MeshShape(expert=case["ranks"], copies=key[1]), ranks_per_node=key[0])
        answers.append(_measure(rank, case, meshes[key]))
    return answers


def _measure(rank: int, case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    torch.manual_seed(rank)
    local = MLP(case["experts"] // case["ranks"], WIDTH, case.get("hidden", HIDDEN))
    network = Network(mesh, torch.bfloat16 if case["bytes"] == 2 else None)
    experts = ParallelExperts(local, mesh, transport=_transport(case["transport"]), network=network)
    source = rank - rank % case.get("copies", 1)  # ranks with the same tokens
    index = torch.tensor(choices(case)[source], dtype=torch.long).view(-1, case["top_k"])
    weight = torch.full(index.shape, 0.5, requires_grad=True)
    x = torch.randn(len(index), WIDTH, generator=torch.Generator().manual_seed(source)).requires_grad_()
    routing = SparseRouting.from_choice(index, weight, case["experts"])
    experts.run(x, routing).square().sum().backward()
    traffic = network.traffic
    return {
        "bytes": [[*key, n] for key, n in traffic.sent.items()],
        "messages": [[*key, n] for key, n in traffic.messages.items()],
    }


def _transport(name: str) -> Any:
    name, *rest = name.split()
    if not rest:
        return make_transport(name)
    make: dict[str, Callable[[str], Any]] = {
        "pairwise": lambda n: Pairwise(int(n)),
        "capacity": lambda n: StaticCapacity(int(n)),
        "shadow": lambda n: Shadow(bandwidth=float(n)),
        "drop-copies": DropCopies,
    }
    return make[name](rest[0])


class Form:
    """Closed forms of one case. Ranks are (node, place); expert e is on rank e // slots.

    Attributes:
        rows: rows from one rank to another, `rows[i][j]`.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.ranks, self.per_node = case, case["ranks"], case["per_node"]
        self.nodes, self.slots = self.ranks // self.per_node, case["experts"] // case["ranks"]
        self.width = case.get("width", WIDTH)
        self.row = self.width * case["bytes"]
        self.choices = choices(case)
        self.rows = [[0] * self.ranks for _ in range(self.ranks)]
        for source, tokens in enumerate(self.choices):
            for chosen in tokens:
                for expert in chosen:
                    self.rows[source][expert // self.slots] += 1

    def link(self, i: int, j: int) -> str:
        return "self" if i == j else "intra" if i // self.per_node == j // self.per_node else "inter"

    def at(self, rank: int) -> Bytes:
        """All that one rank sends."""
        name = self.case["transport"].split()[0].replace("-", "_")
        found: Bytes = getattr(self, name)(rank)
        return Counter({key: n for key, n in found.items() if n})

    def there_and_back(self, i: int, sent: Callable[[int, int], int], peers: list[int], size: int) -> Bytes:
        """Dispatch, combine and both gradients, where `sent(i, j)` numbers go from i to j in a dispatch."""
        total: Bytes = Counter()
        for j in peers:
            there, back = sent(i, j) * size, sent(j, i) * size
            total["dispatch", "forward", self.link(i, j)] += there
            total["combine", "forward", self.link(i, j)] += back
            total["combine", "backward", self.link(i, j)] += there
            total["dispatch", "backward", self.link(i, j)] += back
        return total

    def told(self, i: int, peers: list[int], numbers: int) -> Bytes:
        total: Bytes = Counter()
        for j in peers:
            total["counts", "forward", self.link(i, j)] += 8 * numbers
        return total

    @property
    def everyone(self) -> list[int]:
        return list(range(self.ranks))

    def linear(self, i: int, parts: int = 1) -> Bytes:
        rows = self.there_and_back(i, lambda a, b: self.rows[a][b], self.everyone, self.row)
        return rows + self.told(i, self.everyone, self.slots * parts)

    def chunked(self, i: int) -> Bytes:
        return self.linear(i, parts=2)

    def pairwise(self, i: int) -> Bytes:
        return self.linear(i, parts=self.ranks // int([*self.case["transport"].split(), "1"][1]))

    def capacity(self, i: int) -> Bytes:
        given = self.case["transport"].split()[1:]
        fullest = max(
            sum(chosen.count(e) for chosen in tokens)
            for tokens in self.choices
            for e in range(self.case["experts"])
        )
        rows = self.slots * (int(given[0]) if given else fullest)
        return self.there_and_back(i, lambda a, b: rows, self.everyone, self.row) + self.told(
            i, self.everyone, 0 if given else 1
        )

    def two_level(self, i: int) -> Bytes:
        place, node = i % self.per_node, i // self.per_node
        inside = [node * self.per_node + p for p in range(self.per_node)]
        across = [n * self.per_node + place for n in range(self.nodes)]

        def to_place(a: int, b: int) -> int:  # everything for b's place on any node
            return sum(self.rows[a][n * self.per_node + b % self.per_node] for n in range(self.nodes))

        def of_node(a: int, b: int) -> int:  # what a's node has for b
            first = a // self.per_node * self.per_node
            return sum(self.rows[first + p][b] for p in range(self.per_node))

        rows = self.there_and_back(i, to_place, inside, self.row) + self.there_and_back(
            i, of_node, across, self.row
        )
        counts = self.told(i, inside, self.nodes * self.slots) + self.told(i, across, self.per_node * self.slots)
        return rows + counts

    def leader(self, i: int) -> Bytes:
        first = i // self.per_node * self.per_node
        inside = [first + p for p in range(self.per_node)]
        leaders = [n * self.per_node for n in range(self.nodes)]

        def collected(a: int, b: int) -> int:
            return sum(self.rows[a]) if b % self.per_node == 0 else 0

        def between(a: int, b: int) -> int:
            here, there = (range(r, r + self.per_node) for r in (a, b))
            return sum(self.rows[source][target] for source in here for target in there)

        def dealt(a: int, b: int) -> int:
            return sum(self.rows[source][b] for source in self.everyone) if a % self.per_node == 0 else 0

        total = self.there_and_back(i, collected, inside, self.row) + self.there_and_back(
            i, dealt, inside, self.row
        )
        total += self.told(i, inside, self.ranks * self.slots * 2)
        if i == first:
            total += self.there_and_back(i, between, leaders, self.row)
            total += self.told(i, leaders, self.per_node**2 * self.slots)
        return total

    def deduplicated(self, i: int) -> Bytes:
        place, node = i % self.per_node, i // self.per_node
        inside = [node * self.per_node + p for p in range(self.per_node)]
        across = [n * self.per_node + place for n in range(self.nodes)]

        def ranks_of(chosen: list[int]) -> list[int]:
            return [expert // self.slots for expert in chosen]

        def to_node(a: int, b: int) -> int:  # tokens of a with an expert on b's node, each once
            wanted = b // self.per_node
            return sum(any(r // self.per_node == wanted for r in ranks_of(c)) for c in self.choices[a])

        def passed_on(a: int, b: int) -> int:  # tokens of a's place on any node with an expert on b, each once
            sources = [n * self.per_node + a % self.per_node for n in range(self.nodes)]
            return sum(b in ranks_of(chosen) for s in sources for chosen in self.choices[s])

        def pairs_to_node(a: int, b: int) -> int:
            return sum(self.rows[a][b // self.per_node * self.per_node + p] for p in range(self.per_node))

        def pairs_passed_on(a: int, b: int) -> int:
            return sum(self.rows[n * self.per_node + a % self.per_node][b] for n in range(self.nodes))

        total: Bytes = Counter()
        levels = [(across, to_node, pairs_to_node), (inside, passed_on, pairs_passed_on)]
        for peers, tokens, pairs in levels:
            if len(peers) == 1 and self.nodes * self.per_node > 1:
                continue
            total += self.there_and_back(i, tokens, peers, self.row) + self.told(i, peers, 2)
            total += self.facts(i, pairs, peers)
        return total

    def facts(self, i: int, pairs: Callable[[int, int], int], peers: list[int]) -> Bytes:
        total: Bytes = Counter()
        for j in peers:
            total["pairs", "forward", self.link(i, j)] += 16 * pairs(i, j)
            total["weights", "forward", self.link(i, j)] += 4 * pairs(i, j)
            total["weights", "backward", self.link(i, j)] += 4 * pairs(j, i)
        return total

    def gather(self, i: int) -> Bytes:
        rows = self.there_and_back(i, lambda a, b: len(self.choices[a]), self.everyone, self.row)
        pairs = self.facts(i, lambda a, b: self.rows[a][b], self.everyone)
        return rows + pairs + self.told(i, self.everyone, 2)

    def data_centric(self, i: int) -> Bytes:
        node, place = i // self.per_node, i % self.per_node
        expert = 2 * self.width * self.case.get("hidden", HIDDEN) * 4  # at its own precision
        total: Bytes = Counter()
        for phase in ("forward", "backward"):
            for n in range(self.nodes):
                total["experts", phase, self.link(i, n * self.per_node + place)] += self.slots * expert
            for p in range(self.per_node):
                total["experts", phase, self.link(i, node * self.per_node + p)] += self.slots * self.nodes * expert
        return total

    def adaptive(self, i: int) -> Bytes:
        """Without slices: as `linear` or as `data-centric`, whichever is less where all have the mean of rows."""
        mean = sum(map(sum, self.rows)) / self.ranks
        expert = 2 * self.width * self.case.get("hidden", HIDDEN) * 4
        rows, experts = 2 * mean * self.row / self.ranks, self.slots * expert  # to one other rank
        form = self.linear(i) if rows < experts else self.data_centric(i)
        return form + self.told(i, self.everyone, 1) + self.told(i, [i], 1)

    def shadow(self, i: int) -> Bytes:
        """As `linear`, but the rows of shadowed experts stay and their weights go to every other rank and back."""
        hot = self.shadows()
        kept, self.rows = self.rows, [[0] * self.ranks for _ in range(self.ranks)]
        for source, tokens in enumerate(self.choices):
            for expert in (e for chosen in tokens for e in chosen if e not in hot):
                self.rows[source][expert // self.slots] += 1
        total, self.rows = self.linear(i), kept
        expert = 2 * self.width * self.case.get("hidden", HIDDEN) * 4
        mine = sum(e // self.slots == i for e in hot)
        for j in self.everyone:
            theirs = sum(e // self.slots == j for e in hot)
            total["experts", "forward", self.link(i, j)] += mine * expert
            total["experts", "backward", self.link(i, j)] += theirs * expert
        return total + self.told(i, self.everyone, self.case["experts"])

    def shadows(self) -> set[int]:
        """Hottest expert of the busiest rank, again and again, while (3 t_c + 4 t_f) B + i t_m falls."""
        flops, bandwidth = 11.5e12, float([*self.case["transport"].split(), 50e9 / 8][1])
        weights = 2 * self.width * self.case.get("hidden", HIDDEN)
        row, shadow = 6 * weights / flops + 4 * self.row / bandwidth, 2 * weights * 4 / bandwidth
        count = Counter(e for tokens in self.choices for chosen in tokens for e in chosen)
        hot: set[int] = set()

        def work(rank: int, without: set[int]) -> int:
            return sum(count[e] for e in range(rank * self.slots, (rank + 1) * self.slots) if e not in without)

        def seconds(without: set[int]) -> float:
            return row * max(work(rank, without) for rank in self.everyone) + len(without) * shadow

        while True:
            busiest = max(self.everyone, key=lambda rank: work(rank, hot))
            slots = [
                e for e in range(busiest * self.slots, (busiest + 1) * self.slots) if e not in hot and count[e]
            ]
            if not slots:
                return hot
            more = {*hot, max(slots, key=lambda e: count[e])}
            if seconds(more) >= seconds(hot):
                return hot
            hot = more

    def drop_copies(self, i: int) -> Bytes:
        """Of an even load that the copies can share: the transport's rows divided, and the copies' own rows."""
        copies = self.case["copies"]
        total: Bytes = Counter()
        for j in self.everyone:
            for name in ("dispatch", "combine"):
                for phase in ("forward", "backward"):
                    total[name, phase, self.link(i, j)] += self.rows[i][j] // copies * self.row
        own = sum(self.rows[i]) // copies * self.row
        for j in range(i - i % copies, i - i % copies + copies):
            total["copies", "forward", self.link(i, j)] += own
            total["copies", "backward", self.link(i, j)] += own
        return total + self.told(i, self.everyone, self.slots)
