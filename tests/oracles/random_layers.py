"""Random layers against code written straight from the papers, in float64: choices, weights, losses, gradients.

Slow on purpose: one token and one expert at a time. Nothing here imports a router, a loss or a kernel.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.layers import MoE
from moestro.routing import Context, Decision

Parameters = Mapping[str, Tensor]
Losses = dict[str, Tensor]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@dataclass
class Draw:
    """A random layer's sizes and inputs; `valid` leaves at least one token."""

    random: np.random.Generator
    num_experts: int
    x: Tensor
    valid: list[bool]
    sequence: list[int]

    @property
    def tokens(self) -> list[int]:
        return [t for t, valid in enumerate(self.valid) if valid]

    def context(self) -> Context:
        return Context(valid=torch.tensor(self.valid), sequence=torch.tensor(self.sequence))

    def pick(self, *values: object) -> object:
        return values[self.random.integers(len(values))]


def draw(seed: int, num_experts: int | None = None, most: int = 24, masked: bool = True) -> Draw:
    random = np.random.default_rng(seed)
    num_experts = num_experts or int(random.integers(2, 7))
    num_tokens, width = int(random.integers(1, most + 1)), int(random.integers(2, 7))
    x = torch.from_numpy(random.normal(size=(num_tokens, width)) * random.choice([0.3, 1.0, 2.0]))
    valid = (random.random(num_tokens) < 0.8) if masked and seed % 2 else np.ones(num_tokens, dtype=bool)
    valid[random.integers(num_tokens)] = True
    sequence = np.sort(random.integers(0, 3, size=num_tokens))
    return Draw(random, num_experts, x, valid.tolist(), sequence.tolist())


def layer(method: str, case: Draw, **options: object) -> MoE:
    moe = moestro.build(method, width=case.x.shape[1], hidden=2, num_experts=case.num_experts, **options).double()
    with torch.no_grad():
        for parameter in moe.router.parameters():
            parameter.copy_(torch.from_numpy(case.random.normal(size=tuple(parameter.shape))))
    return moe


def compare(
    moe: MoE,
    case: Draw,
    slow: Callable[[Tensor, Parameters], tuple[Tensor, Losses]],
    matrix_of: Callable[[Decision], Tensor] = lambda decision: decision.routing.combine_matrix(),
    seed: int | None = None,
) -> None:
    """Assert that layer and paper choose, weigh, lose and differentiate alike.

    `slow(x, parameters)` answers the whole combine matrix `[tokens, experts]` and the losses by name.
    """
    if seed is not None:
        torch.manual_seed(seed)
    x, copy = (case.x.clone().requires_grad_() for _ in range(2))
    decision = moe.route(x, case.context())
    parameters = {name: p.detach().clone().requires_grad_() for name, p in moe.router.named_parameters()}
    expected, losses = slow(copy, parameters)
    ours = matrix_of(decision)
    assert torch.equal(ours != 0, expected != 0), "other choices"
    assert_close(ours, expected, **EXACT)
    assert sorted(losses) == sorted(moe.losses)
    probe = torch.cos(torch.arange(ours.numel(), dtype=torch.float64)).view_as(ours)
    fast_sum, slow_sum = (ours * probe).sum(), (expected * probe).sum()
    for n, (name, (_, loss)) in enumerate(moe.losses.items()):
        value = loss(decision)
        assert_close(value.double(), losses[name], msg=lambda m, name=name: f"{name}: {m}", **EXACT)
        fast_sum, slow_sum = fast_sum + (n + 0.5) * value, slow_sum + (n + 0.5) * losses[name]
    fast = torch.autograd.grad(fast_sum, [x, *moe.router.parameters()], allow_unused=True)
    true = torch.autograd.grad(slow_sum, [copy, *parameters.values()], allow_unused=True)
    for name, a, b in zip(["x", *parameters], fast, true, strict=True):
        a, b = (torch.zeros(()) if each is None else each for each in (a, b))
        assert_close(
            *torch.broadcast_tensors(a.double(), b.double()), rtol=1e-9, atol=1e-9, msg=partial(_name, name)
        )


def _name(name: str, message: str) -> str:
    return f"gradient of {name}: {message}"


def softmax(z: Tensor) -> Tensor:
    e = torch.stack([torch.exp(each - z.detach().max()) for each in z])
    return e / e.sum()


def scores(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Logits of every token: one dot product per expert."""
    return [torch.stack([(row * w).sum() for w in weight]) for row in x]


def ranked(values: Tensor) -> list[int]:
    """Experts by falling score; the lower number first among equals."""
    numbers = values.detach().tolist()
    return sorted(range(len(numbers)), key=lambda e: (-numbers[e], e))


def matrix(case: Draw, entries: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """The combine matrix of some (token, expert) entries."""
    zero = torch.zeros((), dtype=torch.float64)
    rows = [
        torch.stack([entries.get((t, e), zero) for e in range(case.num_experts)]) for t in range(len(case.valid))
    ]
    return torch.stack(rows)


def count_times_probability(case: Draw, chosen: Mapping[int, list[int]], p: list[Tensor], divisor: float) -> Tensor:
    """E sum_e f_e P_e with f_e = count_e / divisor."""
    value = torch.zeros((), dtype=torch.float64)
    for e in range(case.num_experts):
        f = sum(experts.count(e) for experts in chosen.values()) / divisor
        value = value + case.num_experts * f * sum(p[t][e] for t in case.tokens) / len(case.tokens)
    return value


def variation(values: list[Tensor]) -> Tensor:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / (mean**2 + 1e-10)


def fill(queue: list[tuple[int, int]], slots: float) -> set[tuple[int, int]]:
    """Who gets a place, in the order of the queue."""
    load: dict[int, int] = {}
    kept = set()
    for t, e in queue:
        if load.get(e, 0) < slots:
            kept.add((t, e))
            load[e] = load.get(e, 0) + 1
    return kept


def switch(seed: int) -> None:
    """Fedus et al. 2021, eqs. 1-6; capacity as in the released code."""
    case = draw(seed)
    factor, least = case.pick(0.5, 1.0, 1.25, 2.0), case.pick(1, 4)
    training = bool(case.pick(True, False))
    moe = layer("switch", case, capacity_factor=factor, eval_capacity_factor=2.0, min_capacity=least, jitter=0.0)
    moe.train(training)

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        probs = [softmax(z) for z in scores(x, p["scorer.scorer.weight"])]
        best = {t: ranked(probs[t])[:1] for t in case.tokens}
        count = len(case.tokens)
        slots = max(min(count, int((factor if training else 2.0) * count / case.num_experts)), least)
        kept = fill([(t, best[t][0]) for t in case.tokens], slots)
        loss = count_times_probability(case, best, probs, count)
        return matrix(case, {(t, e): probs[t][e] for t, e in kept}), {"balance": loss}

    compare(moe, case, slow)


def gshard_top2(seed: int) -> None:
    """Lepikhin et al. 2020, algorithm 1: the second choice is drawn, first choices are placed first."""
    case = draw(seed)
    factor = case.pick(None, 0.5, 1.0, 2.0)
    if factor == 0.5 and len(case.tokens) <= case.num_experts:
        factor = 1.0  # half of one slot is none, which is refused
    moe = layer("gshard-top2", case, capacity_factor=factor, second="random").train()
    torch.manual_seed(seed)
    chance = torch.rand(len(case.valid), dtype=torch.float64).tolist()

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        probs = [softmax(z) for z in scores(x, p["scorer.weight"])]
        best = {t: ranked(probs[t])[:2] for t in case.tokens}
        weight: dict[tuple[int, int], Tensor] = {}
        seconds = []
        for t, (first, second) in best.items():
            both = probs[t][first] + probs[t][second] + 1e-9
            weight[t, first], weight[t, second] = probs[t][first] / both, probs[t][second] / both
            if chance[t] <= 2 * float(weight[t, second].detach()):
                seconds.append((t, second))
        count = len(case.tokens)
        slots = math.inf if factor is None else int(factor * math.ceil(count / case.num_experts))
        kept = fill([(t, best[t][0]) for t in case.tokens] + seconds, slots)
        loss = count_times_probability(case, {t: b[:1] for t, b in best.items()}, probs, count)
        return matrix(case, {pair: weight[pair] for pair in kept}), {"balance": loss}

    compare(moe, case, slow, seed=seed)


def v_moe(seed: int) -> None:
    """Riquelme et al. 2021: fixed noise, softmax before top-k, batch priority, importance and load losses."""
    case = draw(seed, num_experts=2 + seed % 3, most=36)
    k, factor = 1 + seed % 2, case.pick(0.1, 0.3, 0.5, 1.05)
    moe = layer("v-moe", case, top_k=k, capacity_factor=factor, priority="batch").train()
    torch.manual_seed(seed)
    noise = torch.randn(len(case.valid), case.num_experts, dtype=torch.float64)
    std = 1 / case.num_experts

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        clean = scores(x, p["scorer.weight"])
        noisy = [z + std * n for z, n in zip(clean, noise, strict=True)]
        probs = [softmax(z) for z in noisy]
        best = {t: ranked(probs[t])[:k] for t in case.tokens}
        slots = math.ceil(factor * k * len(case.tokens) / case.num_experts)
        slots += -slots % 4
        order = sorted(case.tokens, key=lambda t: -float(probs[t].detach().max()))
        kept = fill([(t, best[t][choice]) for choice in range(k) for t in order], slots)
        importance = [sum(softmax(clean[t])[e] for t in case.tokens) for e in range(case.num_experts)]
        load = []
        for e in range(case.num_experts):
            tail = [1 - _phi((noisy[t][ranked(noisy[t])[k - 1]] - clean[t][e]) / std) for t in case.tokens]
            load.append(sum(tail) / len(case.tokens))
        losses = {"importance": variation(importance), "load": variation(load)}
        return matrix(case, {(t, e): probs[t][e] for t, e in kept}), losses

    compare(moe, case, slow, seed=seed)


def _phi(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def base_layers(seed: int) -> None:
    """Lewis et al. 2021, eq. 3, with the assignment by scipy."""
    case = draw(seed)
    moe = layer("base-layers", case).train()

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        logits = scores(x, p["scorer.weight"])
        worth = np.array([logits[t].detach().tolist() for t in case.tokens])
        owner = even_assignment(worth)
        pairs = zip(case.tokens, owner, strict=True)
        return matrix(case, {(t, e): 1 / (1 + torch.exp(-logits[t][e])) for t, e in pairs}), {}

    compare(moe, case, slow)


def even_assignment(worth: np.ndarray) -> list[int]:
    """The best assignment whose loads differ by at most one: a column per place, idle rows for spare places."""
    count, num_experts = worth.shape
    share, rest = divmod(count, num_experts)
    places = [e for e in range(num_experts) for _ in range(share)]
    if rest:
        places += list(range(num_experts))
        idle = np.full((num_experts - rest, len(places)), -1e6)
        idle[:, share * num_experts :] = 0
        worth = np.concatenate([worth[:, places], idle])
    else:
        worth = worth[:, places]
    row, column = linear_sum_assignment(worth, maximize=True)
    return [places[c] for r, c in sorted(zip(row, column, strict=True)) if r < count]


def s_base_sinkhorn(seed: int) -> None:
    """Clark et al. 2022: the best entries of a transport plan, scaled in the log domain until it stands still.

    The plan of a single token is even: all its experts tie, so that layers of one token are drawn again.
    """
    case = next(case for n in range(100) if len((case := draw(seed + 100_000 * n)).tokens) > 1)
    k = 1 + seed % 2
    moe = layer("s-base-sinkhorn", case, top_k=k, tolerance=1e-13).train()
    with torch.no_grad():  # a spread of logits that both can solve
        moe.router.scorer.weight *= 0.5

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        logits = scores(x, p["scorer.weight"])
        plan = log_plan(np.array([logits[t].detach().tolist() for t in case.tokens]))
        weights = {}
        for row, t in enumerate(case.tokens):
            probs = softmax(logits[t])
            for e in ranked(torch.from_numpy(plan[row]))[:k]:
                weights[t, e] = 1 / (1 + torch.exp(-logits[t][e])) if k == 1 else probs[e]
        return matrix(case, weights), {}

    compare(moe, case, slow)


def log_plan(z: np.ndarray, sweeps: int = 3000) -> np.ndarray:
    """Logarithm of the plan with row sums 1/T and column sums 1/E."""
    count, num_experts = z.shape
    u, v = np.zeros(count), np.zeros(num_experts)
    for _ in range(sweeps):
        before = v
        u = -np.log(count) - np.logaddexp.reduce(z + v, axis=1)
        v = -np.log(num_experts) - np.logaddexp.reduce(z + u[:, None], axis=0)
        if np.abs(v - before).max() < 1e-15:
            break
    return z + u[:, None] + v


def soft_moe(seed: int) -> None:
    """Puigcerver et al. 2023, section 2 and algorithm 1; the matrix holds dispatch and combine weights."""
    case = draw(seed, most=12)
    slots = 1 + seed % 3
    moe = layer("soft-moe", case, slots_per_expert=slots)
    groups = sorted(set(case.sequence))

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        count, num_slots = len(case.valid), case.num_experts * slots
        keys = [w / w.square().sum().sqrt() for w in p["slots"].flatten(0, 1)]
        unit = [row / (row.square().sum() + 1e-6).sqrt() for row in x]
        logits = [torch.stack([p["scale"] * (row * key).sum() for key in keys]) for row in unit]
        zero = torch.zeros(num_slots, dtype=torch.float64)
        combine = torch.stack([softmax(logits[t]) if case.valid[t] else zero for t in range(count)])
        dispatch = [[zero[0]] * count for _ in range(num_slots)]
        for group in groups:
            members = [t for t in case.tokens if case.sequence[t] == group]
            for s in range(num_slots if members else 0):
                for t, share in zip(members, softmax(torch.stack([logits[t][s] for t in members])), strict=True):
                    dispatch[s][t] = share
        read = torch.stack([torch.stack(row) for row in dispatch])
        return torch.cat([combine, read.t()], 1), {}

    compare(moe, case, slow, partial(soft_matrix, case))


def soft_matrix(case: Draw, decision: Decision) -> Tensor:
    """Combine and dispatch weights of a SoftRouting, one row per token; each token is in one group."""
    routing = decision.routing
    slots = routing.dispatch_weight.shape[1] * routing.dispatch_weight.shape[2]
    combine = routing.combine_weight.flatten(2)  # [groups, length, slots]
    read = routing.dispatch_weight.flatten(1, 2).transpose(1, 2)
    both = torch.cat([combine, read], 2)
    rows = both.new_zeros(len(case.valid), 2 * slots)
    return rows.index_add(0, routing.token.flatten(), both.flatten(0, 1))


def expert_choice_capped(seed: int) -> None:
    """Zhou et al. 2022, section 3.2, against a linear program without entropy.

    Where the second-best assignment is within 20 times the entropy of the best, the two may differ: such layers are
    drawn again.
    """
    bound = 1 + seed % 2
    entropy = 1e-3
    for attempt in range(200):
        case = draw(seed + 100_000 * attempt, num_experts=2 + seed % 3, most=9, masked=False)
        moe = layer("expert-choice-capped", case, capacity_factor=float(bound), max_experts=bound, entropy=entropy)
        with torch.no_grad():
            worth = np.array([softmax(z).tolist() for z in scores(case.x, moe.router.scorer.weight)])
        slots = min(max(int(len(worth) * bound / case.num_experts), 1), len(worth))
        slots = min(slots, len(worth) * bound // case.num_experts)
        if slots and bound <= case.num_experts:
            picked, gap = capped_program(worth, slots, bound)
            if gap > 20 * entropy:
                break
    else:
        raise AssertionError(f"no layer with a clear optimum near seed {seed}")

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        probs = [softmax(z) for z in scores(x, p["scorer.weight"])]
        return matrix(case, {(t, e): probs[t][e] for t, e in picked}), {}

    compare(moe, case, slow)


def capped_program(worth: np.ndarray, slots: int, bound: int) -> tuple[set[tuple[int, int]], float]:
    """The best pairs, and by how much they beat the next best; vertices of this program are whole numbers."""
    count, num_experts = worth.shape
    per_expert = np.kron(np.ones((1, count)), np.eye(num_experts))
    per_token = np.kron(np.eye(count), np.ones((1, num_experts)))

    def solve(forbidden: int | None = None) -> tuple[float, np.ndarray]:
        bounds = [(0.0, 0.0 if i == forbidden else 1.0) for i in range(count * num_experts)]
        solved = linprog(
            -worth.flatten(),
            A_ub=per_token,
            b_ub=np.full(count, bound),
            A_eq=per_expert,
            b_eq=np.full(num_experts, slots),
            bounds=bounds,
        )
        return (-solved.fun, solved.x) if solved.status == 0 else (-np.inf, np.zeros(count * num_experts))

    best, plan = solve()
    chosen = np.flatnonzero(plan > 0.5)
    gap = min((best - solve(int(i))[0] for i in chosen), default=np.inf)
    return {(int(i) // num_experts, int(i) % num_experts) for i in chosen}, float(gap)


def grouped(case: Draw) -> tuple[int, int, int]:
    """A number of experts in equal groups: groups, experts of a group, groups kept."""
    groups, per_group = int(case.random.integers(2, 5)), int(case.random.integers(1, 4))
    case.num_experts = groups * per_group
    return groups, per_group, int(case.random.integers(1, groups + 1))


def limited(score: Tensor, groups: int, per_group: int, kept: int, best_of: int, k: int) -> list[int]:
    """The k best experts in the best groups; a group scores the sum of its `best_of` highest."""
    number = score.detach().tolist()
    of_group = [sorted(number[g * per_group : (g + 1) * per_group])[::-1][:best_of] for g in range(groups)]
    value = [sum(each) for each in of_group]
    best = sorted(range(groups), key=lambda g: (-value[g], g))[:kept]
    allowed = [e for e in range(len(number)) if e // per_group in best]
    return sorted(allowed, key=lambda e: (-number[e], e))[:k]


def deepseek_v2(seed: int) -> None:
    """DeepSeek-AI 2024 (V2), section 2.2: device-limited routing and the balance at three levels, eqs. 23-31."""
    case = draw(seed)
    groups, per_group, kept = grouped(case)
    # all experts for every token would be even whatever the router does, and a balance of that is refused
    k = int(case.random.integers(1, min(per_group * kept, case.num_experts - 1) + 1))
    moe = layer(
        "deepseek-v2",
        case,
        top_k=k,
        num_groups=groups,
        groups_kept=kept,
        route_scale=1.5,
        shared_experts=0,
        device_balance=0.05,
        communication_balance=0.02,
    )

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        probs = [softmax(z) for z in scores(x, p["scorer.weight"])]
        best = {t: limited(probs[t], groups, per_group, kept, 1, k) for t in case.tokens}
        count = len(case.tokens)
        mean = [sum(probs[t][e] for t in case.tokens) / count for e in range(case.num_experts)]
        device = communication = torch.zeros((), dtype=torch.float64)
        for g in range(groups):
            own = range(g * per_group, (g + 1) * per_group)
            f = [case.num_experts / (k * count) * sum(best[t].count(e) for t in best) for e in own]
            sent = sum(any(e in own for e in best[t]) for t in best)
            share = sum(mean[e] for e in own)
            device = device + sum(f) / per_group * share
            communication = communication + groups / (kept * count) * sent * share
        losses = {
            "balance": count_times_probability(case, best, probs, k * count),
            "device_balance": device,
            "communication_balance": communication,
        }
        return matrix(case, {(t, e): 1.5 * probs[t][e] for t in best for e in best[t]}), losses

    compare(moe, case, slow)


def deepseek_v3(seed: int) -> None:
    """DeepSeek-AI 2024 (V3), eqs. 12-20: biased selection in the best groups, balance per sequence."""
    case = draw(seed)
    groups, per_group, kept = grouped(case)
    k = int(case.random.integers(1, per_group * kept + 1))
    moe = layer("deepseek-v3", case, top_k=k, num_groups=groups, groups_kept=kept, shared_experts=0)
    bias = torch.from_numpy(case.random.normal(size=case.num_experts)).float()
    moe.router.select.bias.copy_(bias)

    def slow(x: Tensor, p: Parameters) -> tuple[Tensor, Losses]:
        s = [torch.stack([1 / (1 + torch.exp(-each)) for each in z]) for z in scores(x, p["scorer.weight"])]
        weights = {}
        for t in case.tokens:
            best = limited(s[t] + bias.double(), groups, per_group, kept, 2, k)
            whole = sum(s[t][e] for e in best) + 1e-20
            weights.update({(t, e): 2.5 * s[t][e] / whole for e in best})
        each = []
        for group in sorted(set(case.sequence)):
            members = [t for t in case.tokens if case.sequence[t] == group]
            if not members:
                continue
            value = torch.zeros((), dtype=torch.float64)
            for e in range(case.num_experts):
                f = case.num_experts / (k * len(members)) * sum(e in ranked(s[t])[:k] for t in members)
                value = value + f * sum(s[t][e] / s[t].sum() for t in members) / len(members)
            each.append(value)
        return matrix(case, weights), {"sequence_balance": sum(each) / len(each)}

    compare(moe, case, slow)


CHECKS: dict[str, Callable[[int], None]] = {
    "switch": switch,
    "gshard-top2": gshard_top2,
    "v-moe": v_moe,
    "base-layers": base_layers,
    "s-base-sinkhorn": s_base_sinkhorn,
    "soft-moe": soft_moe,
    "expert-choice-capped": expert_choice_capped,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
}
