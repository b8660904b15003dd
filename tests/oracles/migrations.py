"""What ranks do in the tests of migration; every function runs on each of two ranks."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moestro
from moestro.balance import RoutingLog
from moestro.balance.rebalance import Rebalancer
from moestro.experts import ModuleExperts
from moestro.experts.migration import migrate
from moestro.experts.parallel import ParallelExperts
from moestro.layers import MoE
from moestro.layers.spread import Gradients, spread
from moestro.parallel import Mesh, MeshShape, Placement

WIDTH, HIDDEN, EXPERTS, RANKS = 16, 32, 6, 2


def run_all(rank: int, cases: list[dict[str, Any]]) -> list[Any]:
    """The answers of several cases, one after another."""
    return [globals()[case.pop("what")](rank, **case) for case in cases]


def layer(
    dtype: torch.dtype = torch.float64, kernel: str = "tiled", sizes: tuple[int, int] = (WIDTH, HIDDEN)
) -> MoE:
    torch.manual_seed(0)
    moe = moestro.build("mixtral", width=sizes[0], hidden=sizes[1], num_experts=EXPERTS, kernel=kernel).to(dtype)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def tokens(step: int, rank: int, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(17 + rank, width, generator=generator, dtype=torch.float64).to(dtype)


def random_placement(chance: random.Random, slots: int) -> Placement:
    """Every expert at least once, the other slots by chance."""
    held = [*range(EXPERTS), *(chance.randrange(EXPERTS) for _ in range(slots - EXPERTS))]
    chance.shuffle(held)
    return Placement(tuple(held), EXPERTS, RANKS)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def loss_of(moe: MoE, step: int, rank: int) -> Tensor:
    return moe(tokens(step, rank, next(moe.parameters()).dtype, moe.experts.width)).square().mean()


def learn(moe: MoE, optimiser: torch.optim.Optimizer, gradients: Gradients, step: int, rank: int) -> None:
    optimiser.zero_grad()
    loss_of(moe, step, rank).backward()
    gradients.reduce()
    optimiser.step()


def learn_alone(moe: MoE, optimiser: torch.optim.Optimizer, step: int) -> None:
    """The same step in one process: the mean of the ranks' losses."""
    optimiser.zero_grad()
    (torch.stack([loss_of(moe, step, rank) for rank in range(RANKS)]).mean()).backward()
    optimiser.step()


def check_slots(rank: int, moe: MoE, optimiser: Any, alone: MoE, its_optimiser: Any) -> None:
    """This rank's slots hold the weights and moments of the experts that they should."""
    bank: Any = moe.experts
    for place, expert in enumerate(bank.placement.experts_of(rank)):
        theirs = alone.experts.parameters_of(expert)
        for name, (parameter, row) in bank.local.parameters_of(place).items():
            other, its_row = theirs[name]
            pairs = [(parameter, other)]
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimiser.state[parameter]:
                    pairs.append((optimiser.state[parameter][key], its_optimiser.state[other][key]))
            for ours, expected in pairs:
                assert_close(ours[row], expected[its_row], rtol=1e-8, atol=1e-10)


def keep_learning(
    rank: int, *, dtype: str, slots: int, kernel: str, times: int, sizes: tuple[int, int] = (WIDTH, HIDDEN)
) -> list[int]:
    """Learn a step, move everything, compare outputs; how many slots came from afar, and outputs that changed."""
    chance, kind = random.Random(0), getattr(torch, dtype)
    moe, alone = layer(kind, kernel, sizes), layer(kind, kernel, sizes)
    mesh = Mesh(MeshShape(expert=RANKS))
    spread(moe, mesh, placement=random_placement(chance, slots))
    gradients, optimiser, its_optimiser = Gradients(moe, mesh), adam(moe), adam(alone)
    fixed, moved, differ = tokens(7, rank, kind, sizes[0]), 0, 0
    for step in range(times):
        learn(moe, optimiser, gradients, step, rank)
        learn_alone(alone, its_optimiser, step)
        before = moe(fixed)
        moved += migrate(moe.experts, random_placement(chance, slots), optimiser).moved
        after = moe(fixed)
        assert_close(after, before)
        differ += not torch.equal(after, before)
        if kind == torch.float64:
            check_slots(rank, moe, optimiser, alone, its_optimiser)
    return [moved, differ]


def change_replicas(rank: int, *, optimiser: str) -> None:
    """Five steps with other replicas at each, against one process."""
    chance, moe, alone = random.Random(1), layer(), layer()
    mesh, kind = Mesh(MeshShape(expert=RANKS)), getattr(torch.optim, optimiser)
    spread(moe, mesh, placement=random_placement(chance, 12))
    ours, theirs = (kind(model.parameters(), lr=0.05) for model in (moe, alone))
    gradients = Gradients(moe, mesh)
    for step in range(5):
        learn(moe, ours, gradients, step, rank)
        learn_alone(alone, theirs, step)
        migrate(moe.experts, random_placement(chance, 12), ours)
        check_slots(rank, moe, ours, alone, theirs)
        replicas: dict[int, list[Tensor]] = {}
        for place, expert in enumerate(moe.experts.placement.experts_of(rank)):
            weights = [p[row] for p, row in moe.experts.local.parameters_of(place).values()]
            assert all(map(torch.equal, replicas.setdefault(expert, weights), weights))


def pay(rank: int) -> list[list[int]]:
    """Swap two experts over ranks, swap them back, do nothing, swap two on one rank; what each cost."""
    moe, mesh = layer(torch.float32), Mesh(MeshShape(expert=RANKS))
    network = spread(moe, mesh, wire_dtype=torch.bfloat16)
    bank, optimiser = moe.experts, adam(moe)
    learn(moe, optimiser, Gradients(moe, mesh), 0, rank)
    first, weights = bank.placement, [p.detach().clone() for p in bank.local.parameters()]
    costs = [migrate(bank, Placement((0, 3, 2, 1, 4, 5), EXPERTS, RANKS), optimiser)]
    assert not torch.equal(bank.local.up[1 - rank], weights[1][1 - rank])
    costs.append(migrate(bank, first, optimiser))
    assert all(map(torch.equal, bank.local.parameters(), weights))  # bfloat16 is for rows only
    costs.append(migrate(bank, first, optimiser))
    costs.append(migrate(bank, Placement((1, 0, 2, 3, 4, 5), EXPERTS, RANKS), optimiser))
    assert network.traffic.bytes("migration", link="intra") == sum(cost.bytes_sent for cost in costs)
    return [[cost.moved, cost.copied, cost.bytes_sent] for cost in costs]


def bring_steps(rank: int) -> list[float]:
    """Experts that are modules and have learned for different times; the steps that each slot knows afterwards."""
    torch.manual_seed(3)
    modules = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(3)]
    bank = ParallelExperts(ModuleExperts(modules, WIDTH), Mesh(MeshShape(expert=RANKS)))
    optimiser = adam(bank)
    for step, expert in enumerate(modules):
        for _ in range(step + 1 + rank):
            optimiser.zero_grad()
            expert(tokens(step, rank)).sum().backward()
            optimiser.step()
    migrate(bank, Placement((5, 1, 0, 3, 4, 2), EXPERTS, RANKS), optimiser)
    return [float(optimiser.state[expert[0].weight]["step"]) for expert in modules]


def rebalance(rank: int) -> list[Any]:
    """Two hot experts on one rank, decided twice: what moved, and the load per rank before and after."""
    moe, mesh = layer(), Mesh(MeshShape(expert=RANKS))
    moe.router.scorer.weight.data[:] = 0
    moe.router.scorer.weight.data[:2] = 1.0  # where the sum of a row is positive, experts 0 and 1
    spread(moe, mesh, placement=Placement((0, 1, 2, 3, 4, 5, 0, 5), EXPERTS, RANKS))
    moe.router.scorer.weight.requires_grad_(False)
    bank, optimiser, log = moe.experts, adam(moe.experts), RoutingLog(moe)
    gradients, rebalancer = Gradients(moe, mesh), Rebalancer(moe, mesh, every=2, predictor="last")
    first, fixed, answer = bank.placement, tokens(7, rank), []
    for step in range(4):
        optimiser.zero_grad()
        with log.recording():
            loss = loss_of(moe, step, rank)
        loss.backward()
        gradients.reduce()
        optimiser.step()
        log.update_controllers()
        before = moe(fixed)
        answer.append({name: cost.moved for name, cost in rebalancer.step(optimiser).items()})
        assert torch.equal(moe(fixed), before)
    seen = rebalancer.state()[".loads"][1].tolist()
    return [
        answer,
        first.balancedness(seen),
        bank.placement.balancedness(seen),
        list(bank.placement.expert_of_slot),
    ]


def refuse(rank: int) -> list[str]:
    """What is refused on all ranks before anything moves: the words."""
    moe = layer()
    spread(moe, Mesh(MeshShape(expert=RANKS)))
    bank, optimiser = moe.experts, adam(moe)
    if rank == 0:
        bank.local(torch.ones(3, WIDTH, dtype=torch.float64), torch.tensor([0, 1, 2, 3])).sum().backward()
        optimiser.step()
    before = [p.detach().clone() for p in bank.local.parameters()]
    other, words = Placement((1, 0, 2, 3, 4, 5), EXPERTS, RANKS), []
    for placement, state in (
        (other, optimiser),  # only one rank has a state
        (other if rank else Placement((0, 3, 2, 1, 4, 5), EXPERTS, RANKS), None),
        (Placement((*range(EXPERTS), 0, 1), EXPERTS, RANKS), None),
    ):
        try:
            migrate(bank, placement, state)
        except ValueError as error:
            words.append(str(error))
    assert all(map(torch.equal, bank.local.parameters(), before))
    assert bank.placement == Placement.contiguous(EXPERTS, RANKS)
    return words
