"""Experts spread over ranks give what one process gives: outputs, losses, every gradient, the clipped norm."""

from dataclasses import asdict
from itertools import product

import pytest
from oracles.expert_parallel import Scene
from oracles.ranks import run_ranks

import moestro
from moestro.parallel import all_transports

ROWS = ["linear", "capacity", "two-level", "leader", "chunked", "pairwise"]
TRANSPORTS = [*ROWS, "deduplicated", "gather", "data-centric", "adaptive", "shadow"]
MEASURING = ["measured", "granular"]  # which take longer
TRAVEL = ("data-centric", "adaptive", "shadow", "measured")  # of experts, that must lie in one bank
STRATEGIES = ("S1", "S2", "S3", "S4")
KEEPING = [f"chunked {name}" for name in ("none", *STRATEGIES)] + ["pairwise S3", "pairwise S4"]
DEGREES = [("expert=2 tensor=2", (0, 1, 2)), ("tensor=4", (0, 1, 2, 4)), ("expert=4", (0, 1))]
# one or more of every router family, and every kind of routing and bank
FAMILIES = [
    "qwen3", "switch", "deepseek-v3", "llama4", "moe-plus-plus", "hash-layers", "dense-softmax", "expert-choice",
    "soft-moe", "remoe", "dynamic-top-p",
]  # fmt: skip
CIRCUMSTANCES = [
    {},
    {"parts": 4, "again": True},
    {"tilt": True, "again": True},
    {"tilt": True, "parts": 4},
]


def stacked(method: str) -> bool:
    """Whether a method's experts lie in one bank, so that they can travel."""
    return method not in ("moe-plus-plus",)


def differences(scenes: list[Scene], ranks: int, seconds: int) -> dict[str, list[str]]:
    """What differs, by scene, rank after rank; empty if nothing does."""
    answers = run_ranks("oracles.expert_parallel:compare", ranks, [asdict(scene) for scene in scenes], seconds)
    assert all(len(answer) == len(scenes) for answer in answers)
    return {
        f"rank {rank}: {scene}": bad
        for rank, answer in enumerate(answers)
        for scene, bad in zip(scenes, answer, strict=True)
        if bad
    }


def some_scenes() -> list[Scene]:
    """Every family with every transport, the circumstances taking turns; and every mesh."""
    pairs = [p for p in product(FAMILIES, TRANSPORTS) if p[1] not in TRAVEL or stacked(p[0])]
    scenes = [
        Scene(method, transport, "expert=4" if number % 3 else "data=2 expert=2", **CIRCUMSTANCES[number % 4])
        for number, (method, transport) in enumerate(pairs)
    ]
    scenes += [Scene("qwen3", t, "expert=4", replicas=True, parts=1 + n % 2) for n, t in enumerate(TRANSPORTS)]
    scenes += [Scene("qwen3", t, "expert=2 tensor=2", again=bool(n % 2)) for n, t in enumerate(TRANSPORTS)]
    copied = ["linear", "gather", *(f"drop-copies {name}" for name in (*ROWS, "data-centric"))]
    meshes = ["expert=2 tensor=2 copies=2", "expert=4 copies=2", "data=2 expert=2 copies=2"]
    scenes += [Scene("deepseek-v3", t, meshes[n % 3], again=n % 2 == 1) for n, t in enumerate(copied)]
    degrees = [Scene("qwen3", f"adaptive {d}", mesh, again=bool(d % 2)) for mesh, all_of in DEGREES for d in all_of]
    degrees += [Scene("switch", "adaptive", mesh, parts=2) for mesh, _ in DEGREES]
    degrees += [Scene("deepseek-v3", f"adaptive 1 {name}", "expert=2 tensor=2") for name in ("chunked", "leader")]
    shadows = ["expert=4", "data=2 expert=2", "expert=2 tensor=2"]
    kept = [("qwen3", "chunked none", "expert=2 tensor=2"), ("qwen3", "chunked S3", "expert=2 tensor=2")]
    kept += [("switch", "pairwise S4", "expert=2 tensor=2"), ("expert-choice", "pairwise S2", "expert=4")]
    kept += [("deepseek-v3", f"chunked {name}", "expert=4") for name in STRATEGIES]
    kept += [("qwen3", "measured", "data=2 expert=2"), ("switch", "measured", "expert=2 tensor=2")]
    kept += [("qwen3", "granular", "expert=2 tensor=2"), ("expert-choice", "granular 1", "expert=4")]
    degrees += [Scene(*each, **CIRCUMSTANCES[number % 4]) for number, each in enumerate(kept)]
    return [
        *scenes,
        *degrees,
        *(
            Scene("qwen3", f"shadow {b}", m, n % 2 + 1, n % 2 == 0, tilt=n < 3)
            for b in (1e15, 1e10)
            for n, m in enumerate(shadows)
        ),
        Scene("qwen3", "pairwise 2", "expert=4", parts=2),
        Scene("mixtral", "linear", "expert=4"),
    ]


def test_four_ranks_give_what_one_process_gives() -> None:
    assert not differences(some_scenes(), ranks=4, seconds=150)


def test_two_ranks_give_what_one_process_gives() -> None:
    triples = [(method, "linear", "expert=2") for method in FAMILIES]
    triples += [("switch", transport, "expert=2") for transport in TRANSPORTS] + [
        ("deepseek-v3", "linear", "data=2")
    ]
    scenes = [Scene(*triple, **CIRCUMSTANCES[number % 4]) for number, triple in enumerate(triples)]
    assert not differences(scenes, ranks=2, seconds=100)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "transport", [*TRANSPORTS, *MEASURING, "drop-copies linear", *KEEPING, "adaptive 0", "adaptive 1", "adaptive 2"]
)
def test_every_method_in_every_circumstance(transport: str) -> None:
    name, *degree = transport.split()
    methods = [m.name for m in moestro.all_methods().values() if m.family != "merging"]
    methods = [method for method in methods if name not in TRAVEL or stacked(method)]
    copies = " copies=2" if name == "drop-copies" else ""
    meshes = (f"expert=4{copies}", f"data=2 expert=2{copies}")
    if name == "adaptive":
        meshes = ("expert=2 tensor=2",) if degree else (*meshes, "expert=2 tensor=2")
    grid = product(methods, meshes, CIRCUMSTANCES)
    scenes = [Scene(method, transport, mesh, **circumstance) for method, mesh, circumstance in grid]
    assert not differences(scenes, ranks=4, seconds=1800)


def test_every_transport_is_in_the_grid() -> None:
    assert set(all_transports()) == {scene.transport.split()[0] for scene in some_scenes()}
