"""Slow routing methods, straight from the equations of the papers.

Loops over tokens and experts on float64 scalars and vectors; autograd gives the gradients. Nothing here
comes from the library. Router weights are [experts, width]; experts are functions of one row
(`oracles.experts.functions`). Ties go to the lowest index. Padded tokens (`valid[t]` false) take no slot,
enter no loss and get a zero row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from oracles.experts import Weights, feed_forward, merge, sigmoid
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


@dataclass
class Answer:
    """What a method says: y [tokens, width], per token the choices, their weights and whether they stay."""

    y: Tensor
    combine: Tensor
    choice: list[list[int]] = field(default_factory=list)
    kept: list[list[bool]] = field(default_factory=list)
    weight: list[list[Tensor]] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


# ---- pieces -------------------------------------------------------------------------------------------


def number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def largest(values: Sequence[float | Tensor], k: int) -> list[int]:
    """Positions of the k largest values, best first; of equal values the lowest position wins."""
    left = [number(v) for v in values]
    found: list[int] = []
    for _ in range(k):
        best = None
        for i, v in enumerate(left):
            if i not in found and (best is None or v > left[best]):
                best = i
        found.append(best)
    return found


def total(values: Sequence[Tensor], like: Tensor) -> Tensor:
    out = like.new_zeros(())
    for v in values:
        out = out + v
    return out


def dot(a: Tensor, b: Tensor) -> Tensor:
    return total([a[i] * b[i] for i in range(len(a))], a)


def logits_of(row: Tensor, router: Tensor) -> Tensor:
    """z_i = x . w_i for every expert."""
    return torch.stack([dot(row, router[i]) for i in range(len(router))])


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.detach().max())
    return e / total(list(e), e)


def stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like


def all_valid(x: Tensor, valid: Sequence[bool] | None) -> list[bool]:
    return [True] * len(x) if valid is None else [bool(v) for v in valid]


def keep_by_position(
    choice: list[list[int]], wanted: list[list[bool]], num_experts: int, capacity: float
) -> list[list[bool]]:
    """Earlier tokens win; all first choices come before any second choice."""
    kept = [[False] * len(c) for c in choice]
    used = [0] * num_experts
    for rank in range(max((len(c) for c in choice), default=0)):
        for t in range(len(choice)):
            e = choice[t][rank]
            if wanted[t][rank] and used[e] < capacity:
                used[e] += 1
                kept[t][rank] = True
    return kept


def answer_of(
    x: Tensor, choice: list[list[int]], weight: list[list[Tensor]], kept: list[list[bool]],
    experts: list[Expert], **rest: object,
) -> Answer:  # fmt: skip
    """y_t = sum over the kept choices of weight * f_i(x_t)."""
    rows, combine = [], []
    for t in range(len(x)):
        y, line = torch.zeros_like(x[t]), [x.new_zeros(()) for _ in experts]
        for e, w, stays in zip(choice[t], weight[t], kept[t], strict=True):
            if stays:
                y, line[e] = y + w * experts[e](x[t]), line[e] + w
        rows.append(y)
        combine.append(torch.stack(line))
    return Answer(
        stack(rows, torch.zeros_like(x)), stack(combine, x.new_zeros(0, len(experts))), choice, kept, weight,
        **rest,
    )  # fmt: skip


# ---- losses -------------------------------------------------------------------------------------------


def count_times_probability(
    probs: list[Tensor], counted: list[list[int]], valid: list[bool], num_experts: int, per_choice: int
) -> Tensor:
    """E sum_i f_i P_i, with f_i = counts / (per_choice * tokens), over valid tokens; f is a constant.

    `counted` first choices and per_choice 1: GShard's top-1 form. All k choices and per_choice k: value 1
    at uniform (Megatron, megablocks). All k choices and per_choice 1: value k at uniform (transformers).
    """
    tokens = [t for t in range(len(probs)) if valid[t]]
    out = torch.zeros((), dtype=torch.float64)
    for i in range(num_experts if tokens else 0):
        f = sum(counted[t].count(i) for t in tokens) / (per_choice * len(tokens))
        mean = total([probs[t][i] for t in tokens], probs[tokens[0]]) / len(tokens)
        out = out + num_experts * f * mean
    return out


def z_loss(logits: list[Tensor], valid: list[bool]) -> Tensor:
    """Mean over valid tokens of (log sum_i exp z_i)^2."""
    squares = [torch.log(total(list(torch.exp(z)), z)) ** 2 for z, v in zip(logits, valid, strict=True) if v]
    return total(squares, torch.zeros((), dtype=torch.float64)) / max(len(squares), 1)


def squared_variation(values: Sequence[Tensor], eps: float = 1e-10) -> Tensor:
    """CV^2 = population variance / (mean^2 + eps)."""
    n = len(values)
    mean = total(values, values[0]) / n
    variance = total([(v - mean) ** 2 for v in values], values[0]) / n
    return variance / (mean**2 + eps)


def normal_cdf(z: Tensor) -> Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def sequence_balance(scores: list[Tensor], valid: list[bool], sequence: list[int], top_k: int) -> Tensor:
    """DeepSeek-V3: per sequence sum_i f_i P_i, averaged over the sequences.

    f_i = E / (k L) * how often i is among the k best *unbiased* scores; P_i = mean of s_i / sum_j s_j.
    """
    values = []
    for name in sorted(set(sequence)):
        tokens = [t for t in range(len(scores)) if sequence[t] == name and valid[t]]
        if not tokens:
            continue
        num_experts = len(scores[tokens[0]])
        best = {t: largest(scores[t].tolist(), top_k) for t in tokens}
        value = scores[tokens[0]].new_zeros(())
        for i in range(num_experts):
            f = num_experts / (top_k * len(tokens)) * sum(i in best[t] for t in tokens)
            mean = total([scores[t][i] / scores[t].sum() for t in tokens], value) / len(tokens)
            value = value + f * mean
        values.append(value)
    return total(values, torch.zeros((), dtype=torch.float64)) / max(len(values), 1)


def bias_step(bias: list[float], load: list[int], rate: float) -> list[float]:
    """b_i + rate * sign(mean load - load_i)."""
    out = []
    for b, c in zip(bias, load, strict=True):
        short = sum(load) - len(load) * c
        out.append(b + rate * ((short > 0) - (short < 0)))
    return out


# ---- token choice -------------------------------------------------------------------------------------


def switch_capacity(factor: float, num_tokens: int, num_experts: int, least: int = 4) -> int:
    """int(CF T / E), at most T, then at least `least`."""
    return max(min(num_tokens, int(factor * num_tokens / num_experts)), least)


def switch(
    x: Tensor, router: Tensor, experts: list[Expert], capacity: float = math.inf,
    valid: Sequence[bool] | None = None, seen: Tensor | None = None,
) -> Answer:  # fmt: skip
    """One expert per token, weighted by its full softmax probability. `seen`: the jittered router input."""
    valid, seen = all_valid(x, valid), x if seen is None else seen
    probs = [softmax(logits_of(row, router)) for row in seen]
    choice = [largest(p.tolist(), 1) for p in probs]
    weight = [[p[c[0]]] for p, c in zip(probs, choice, strict=True)]
    kept = keep_by_position(choice, [[v] for v in valid], len(experts), capacity)
    balance = count_times_probability(probs, choice, valid, len(experts), 1)
    return answer_of(x, choice, weight, kept, experts, probs=probs, losses={"balance": balance})


def gshard_capacity(factor: float, num_tokens: int, num_experts: int) -> int:
    """factor * ceil(T / E); the papers' code has factor 2 for top-2."""
    return int(factor * math.ceil(num_tokens / num_experts))


def gshard(
    x: Tensor, router: Tensor, experts: list[Expert], capacity: float = math.inf,
    valid: Sequence[bool] | None = None, draws: Sequence[float] | None = None,
) -> Answer:  # fmt: skip
    """Top-2 of a softmax, the pair normalised before anything is dropped.

    With draws u the second stays if not 2 g2 < u; without, it always stays. Then capacity by position.
    The loss counts first choices only.
    """
    valid = all_valid(x, valid)
    probs = [softmax(logits_of(row, router)) for row in x]
    choice, weight, wanted = [], [], []
    for t, p in enumerate(probs):
        first, second = largest(p.tolist(), 2)
        g1, g2 = p[first] / (p[first] + p[second] + 1e-9), p[second] / (p[first] + p[second] + 1e-9)
        stays = draws is None or not 2 * number(g2) < draws[t]
        choice.append([first, second])
        weight.append([g1, g2])
        wanted.append([valid[t], valid[t] and stays])
    kept = keep_by_position(choice, wanted, len(experts), capacity)
    balance = count_times_probability(probs, [c[:1] for c in choice], valid, len(experts), 1)
    return answer_of(x, choice, weight, kept, experts, probs=probs, losses={"balance": balance})


def shazeer(
    x: Tensor, router: Tensor, noise_router: Tensor, experts: list[Expert], top_k: int,
    valid: Sequence[bool] | None = None, draws: Tensor | None = None, eps: float = 1e-2,
) -> Answer:  # fmt: skip
    """Noisy top-k, softmax over the survivors. `draws` [tokens, experts], normal; None in evaluation.

    importance: CV^2 of sum_t a_ti. load: CV^2 of sum_t Phi((clean - k-th best of the others) / std);
    the hard count (a constant) when k = E or without noise.
    """
    valid, num_experts = all_valid(x, valid), len(experts)
    importance = [x.new_zeros(()) for _ in experts]
    load = [x.new_zeros(()) for _ in experts]
    choice, weight = [], []
    for t, row in enumerate(x):
        clean = logits_of(row, router)
        std = torch.log(1 + torch.exp(logits_of(row, noise_router))) + eps
        noisy = clean if draws is None else clean + std * draws[t]
        chosen = largest(noisy.tolist(), top_k)
        a = softmax(torch.stack([noisy[i] for i in chosen]))
        choice.append(chosen)
        weight.append(list(a))
        if not valid[t]:
            continue
        for rank, i in enumerate(chosen):
            importance[i] = importance[i] + a[rank]
        for i in range(num_experts):
            if draws is None or top_k == num_experts:
                load[i] = load[i] + (i in chosen)
            else:
                others = [j for j in range(num_experts) if j != i]
                kth = others[largest([number(noisy[j]) for j in others], top_k)[-1]]
                load[i] = load[i] + normal_cdf((clean[i] - noisy[kth]) / std[i])
    losses = {"importance": squared_variation(importance), "load": squared_variation(load)}
    kept = [[v] * top_k for v in valid]
    return answer_of(x, choice, weight, kept, experts, losses=losses)


def mixtral(
    x: Tensor, router: Tensor, experts: list[Expert], top_k: int = 2, valid: Sequence[bool] | None = None
) -> Answer:
    """Softmax over the k best logits, nobody dropped; the loss sums to k at uniform (transformers)."""
    valid = all_valid(x, valid)
    logits = [logits_of(row, router) for row in x]
    choice = [largest(z.tolist(), top_k) for z in logits]
    weight = [list(softmax(torch.stack([z[i] for i in c]))) for z, c in zip(logits, choice, strict=True)]
    probs = [softmax(z) for z in logits]
    balance = count_times_probability(probs, choice, valid, len(experts), 1)
    kept = [[v] * top_k for v in valid]
    return answer_of(x, choice, weight, kept, experts, probs=probs, losses={"balance": balance})


def deepseek_v3(
    x: Tensor, router: Tensor, bias: Sequence[float], experts: list[Expert], top_k: int, num_groups: int = 1,
    groups_kept: int = 1, route_scale: float = 2.5, shared: Expert | None = None,
    valid: Sequence[bool] | None = None, sequence: Sequence[int] | None = None,
) -> Answer:  # fmt: skip
    """Sigmoid scores; the bias acts on the choice only; groups ranked by the sum of their two best.

    Groups are runs of E / num_groups neighbouring experts; those left out cannot be chosen at all.
    """
    valid, num_experts = all_valid(x, valid), len(experts)
    size = num_experts // num_groups
    scores = [sigmoid(logits_of(row, router)) for row in x]
    choice, weight = [], []
    for s in scores:
        biased = [number(s[i]) + number(bias[i]) for i in range(num_experts)]
        groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
        worth = [sum(sorted((biased[i] for i in g), reverse=True)[: max(1, min(2, size))]) for g in groups]
        allowed = sorted(i for g in largest(worth, groups_kept) for i in groups[g])
        chosen = [allowed[j] for j in largest([biased[i] for i in allowed], top_k)]
        norm = total([s[i] for i in chosen], s) + 1e-20
        choice.append(chosen)
        weight.append([route_scale * s[i] / norm for i in chosen])
    names = [0] * len(x) if sequence is None else [int(n) for n in sequence]
    losses = {"sequence_balance": sequence_balance(scores, valid, names, top_k)}
    kept = [[v] * top_k for v in valid]
    answer = answer_of(x, choice, weight, kept, experts, probs=scores, losses=losses)
    if shared is not None and len(x):
        answer.y = answer.y + torch.stack([shared(row) * v for row, v in zip(x, valid, strict=True)])
    return answer


def hash_layers(
    x: Tensor, token_ids: Sequence[int], table: Sequence[int], experts: list[Expert],
    valid: Sequence[bool] | None = None,
) -> Answer:  # fmt: skip
    """y_t = f_{table[id_t]}(x_t), weight one."""
    choice = [[int(table[int(i)])] for i in token_ids]
    kept = [[v] for v in all_valid(x, valid)]
    return answer_of(x, choice, [[x.new_ones(())] for _ in x], kept, experts)


# ---- experts choose, soft, merging --------------------------------------------------------------------


def expert_choice(
    x: Tensor, router: Tensor, experts: list[Expert], slots: int, valid: Sequence[bool] | None = None
) -> Answer:
    """Every expert takes its `slots` best tokens by S = softmax over experts; weight S, as it is."""
    valid, num_experts = all_valid(x, valid), len(experts)
    probs = [softmax(logits_of(row, router)) for row in x]
    taken: list[list[int]] = [[] for _ in x]
    for i in range(num_experts):
        affinity = [number(p[i]) * v for p, v in zip(probs, valid, strict=True)]
        for t in largest(affinity, min(slots, len(x))):
            taken[t].append(i)
    weight = [[probs[t][i] for i in taken[t]] for t in range(len(x))]
    kept = [[valid[t]] * len(taken[t]) for t in range(len(x))]
    return answer_of(x, taken, weight, kept, experts, probs=probs)


def soft_moe_weights(
    x: Tensor, slots: Tensor, scale: Tensor, valid: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """dispatch [slots, tokens] and combine [tokens, slots] of one sequence; slots [num_slots, width]."""
    valid = all_valid(x, valid)
    seen = [row / torch.sqrt(dot(row, row) + 1e-6) for row in x]
    unit = [mu / torch.sqrt(dot(mu, mu)) for mu in slots]
    logits = torch.stack([torch.stack([scale * dot(row, mu) for mu in unit]) for row in seen])
    dispatch = []
    for s in range(len(slots)):
        part = softmax(torch.stack([logits[t, s] for t in range(len(x)) if valid[t]]))
        line, n = [], 0
        for t in range(len(x)):
            line.append(part[n] if valid[t] else x.new_zeros(()))
            n += valid[t]
        dispatch.append(torch.stack(line))
    combine = [softmax(logits[t]) if valid[t] else torch.zeros_like(logits[t]) for t in range(len(x))]
    return torch.stack(dispatch), torch.stack(combine)


def soft_moe(
    x: Tensor, slots: Tensor, scale: Tensor, experts: list[Expert], valid: Sequence[bool] | None = None,
    sequence: Sequence[int] | None = None,
) -> Answer:  # fmt: skip
    """Every slot a mean of the sequence's tokens, every token a mean of all slots. slots [E * S, width]."""
    valid = all_valid(x, valid)
    names = [0] * len(x) if sequence is None else [int(n) for n in sequence]
    per_expert = len(slots) // len(experts)
    y = [torch.zeros_like(row) for row in x]
    matrix = [x.new_zeros(len(experts)) for _ in x]
    for name in sorted(set(names)):
        tokens = [t for t in range(len(x)) if names[t] == name]
        if not any(valid[t] for t in tokens):
            continue
        group = torch.stack([x[t] for t in tokens])
        dispatch, combine = soft_moe_weights(group, slots, scale, [valid[t] for t in tokens])
        for s in range(len(slots)):
            row = torch.zeros_like(x[0])
            for u in range(len(tokens)):
                row = row + dispatch[s, u] * group[u]
            out = experts[s // per_expert](row)
            for u, t in enumerate(tokens):
                y[t] = y[t] + combine[u, s] * out
        for u, t in enumerate(tokens):
            matrix[t] = combine[u].view(len(experts), per_expert).sum(1)
    return Answer(stack(y, torch.zeros_like(x)), stack(matrix, x.new_zeros(0, len(experts))))


def layer_norm(v: Tensor, eps: float) -> Tensor:
    mean = total(list(v), v) / len(v)
    return (v - mean) / torch.sqrt(total([(c - mean) ** 2 for c in v], v) / len(v) + eps)


def smear_mixture(context: Tensor, embedding: Tensor, eps: float) -> Tensor:
    """softmax_i(LN(v) . LN(e_i) / sqrt(d)) for the mean v of one example."""
    seen, width = layer_norm(context, eps), len(context)
    return softmax(torch.stack([dot(seen, layer_norm(e, eps)) / math.sqrt(width) for e in embedding]))


def drop_experts(probs: Tensor, dropped: Sequence[bool]) -> Tensor:
    """(p + 1e-6) / sum (p + 1e-6), with the dropped p at zero."""
    left = torch.stack([p * 0 if gone else p for p, gone in zip(probs, dropped, strict=True)]) + 1e-6
    return left / total(list(left), left)


def smear(
    x: Tensor, embedding: Tensor, bank: list[Weights], activation: str, eps: float = 1e-5,
    valid: Sequence[bool] | None = None, sequence: Sequence[int] | None = None,
    dropped: dict[int, Sequence[bool]] | None = None,
) -> Answer:  # fmt: skip
    """Merge the experts' weights by the example's probabilities, then run the merged expert on its tokens."""
    valid = all_valid(x, valid)
    names = [0] * len(x) if sequence is None else [int(n) for n in sequence]
    y = [torch.zeros_like(row) for row in x]
    matrix = [x.new_zeros(len(bank)) for _ in x]
    for name in sorted(set(names)):
        tokens = [t for t in range(len(x)) if names[t] == name and valid[t]]
        if not tokens:
            continue
        context = stack([x[t] for t in tokens], x).sum(0) / len(tokens)
        mixture = smear_mixture(context, embedding, eps)
        mixture = mixture if dropped is None else drop_experts(mixture, dropped[name])
        merged = merge(bank, mixture)
        for t in tokens:
            y[t], matrix[t] = feed_forward(x[t], merged, activation), mixture
    return Answer(stack(y, torch.zeros_like(x)), stack(matrix, x.new_zeros(0, len(bank))))
