"""The list of what keeps experts busy is complete, and its values at perfect balance are true."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moestro.balance import Controller, Loss, PerSequence
from moestro.balance.catalogue import BALANCINGS
from moestro.routers.capacities import Capacity
from moestro.routing import Decision, SparseRouting

E, K, D, T = 8, 2, 4, 32
ARGUMENTS = {
    "num_groups": D,
    "groups_kept": K,
    "num_nodes": D,
    "num_devices": D,
    "num_domains": 2,
    "temperature": 0.5,
    "prices": tuple(float(n) for n in range(1, E + 1)),
    "top_k": K,
    "variance": "unbiased",
    "delta": 0.25,
    "smoothing": 0.1,
    "budget": 0.5,
    "start": 3.0,
}


def even_decision(k: int) -> Decision:
    """Uniform probabilities, and choices that serve each expert (and group, device, task) alike."""
    probs = torch.full((T, E), 1 / E, dtype=torch.float64)
    choice = (torch.arange(T).unsqueeze(1) + E // D * torch.arange(k)) % E
    notes: dict[str, Tensor] = {
        "choice": choice,
        "sequence": torch.arange(T) // E,
        "domain": torch.arange(T) // E % 2,
        "noisy_logits": torch.zeros(T, E, dtype=torch.float64),
        "noise_std": torch.ones(T, E, dtype=torch.float64),
        "shared_weight": torch.full((T,), 0.3, dtype=torch.float64),
        "selectors": torch.full((T, k, E), 1 / E, dtype=torch.float64),
        "guess": torch.zeros(T, dtype=torch.float64),
        "picked": torch.arange(T) % 2 == 0,
        "taught": torch.zeros(T, E, dtype=torch.float64),
        "sent": torch.ones(T, D, dtype=torch.float64),
        "group_chance": torch.ones(T, D, dtype=torch.float64) / D,
        "place_chance": torch.ones(T, D, E // D, dtype=torch.float64),
    }
    routing = SparseRouting.from_choice(choice, probs.gather(1, choice), E)
    return Decision(routing, torch.zeros_like(probs), probs, notes)


def even_value(text: str) -> float:
    """The number that a value at balance says, at the sizes of this test."""
    known = {
        "log(E)^2 at z = 0": math.log(E) ** 2,
        "log(2) at guess 0": math.log(2),
        "k mean(price) / E": K * sum(ARGUMENTS["prices"]) / E / E,
        "delta^2 n / (n - 1)": 0.25**2 * (T // E * E) / (T // E * E - 1),
        "KL(even || own device)": -math.log(D) - math.log(0.9 + 0.1 / D) / D - (1 - 1 / D) * math.log(0.1 / D),
        "|mean(g) - budget|": 0.2,
        "that loss": 1.0,
        "scale times that loss": 3.0,
        "that error": 0.0,
    }
    symbols = {"E": E, "k": K, "log": math.log}
    return known[text] if text in known else float(eval(text.replace(" log", " * log"), {}, symbols))


@pytest.mark.parametrize("entry", [b for b in BALANCINGS if b.kind == "loss"], ids=lambda b: b.name)
def test_the_value_at_perfect_balance_is_as_listed(entry):
    wraps = BALANCINGS[0].part("megatron")
    if entry.options.startswith('"'):
        loss = entry.part(entry.options.strip('"'))
    else:
        names = [name for name in entry.options.split(", ") if name]
        loss = entry.part(*(wraps if name == "loss" else ARGUMENTS[name] for name in names))
    k = 1 if entry.part.__name__ in ("SingleChoiceBalance", "WhenSparse") else K
    assert_close(float(loss(even_decision(k))), even_value(entry.even), rtol=1e-5, atol=1e-7)


def test_every_part_is_listed():
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    listed, rooms = {entry.part for entry in BALANCINGS}, ("moestro.balance.", "moestro.routers.")
    for base in (Loss, Controller, Capacity):
        ours = {kind for kind in below(base) if kind.__module__.startswith(rooms) and not kind.__abstractmethods__}
        assert {kind.__name__ for kind in ours - listed} <= {"Variation", "LoadMemory"}
    assert PerSequence in listed


def test_names_are_distinct():
    names = [entry.name for entry in BALANCINGS]
    assert len(set(names)) == len(names)
