"""Every number of a survey equals a plain recomputation, token by token."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from moestro.inspect.chosen import BLOCK, coactivation, coverage, experts_for, next_layer
from moestro.inspect.similarity import cosines, output_cosines
from moestro.inspect.survey import Survey
from moestro.routing import Decision, SparseRouting

TOKENS, EXPERTS, TOP_K = 300, 7, 2


class Letters:
    """Token id 0 is a, 1 is b ..."""

    @staticmethod
    def decode_bytes(ids):
        return bytes(97 + i for i in ids)


def decision(seed, *, bias=True, padding=9, scale=2.0, top_k=TOP_K):
    """Random logits, a bias that keeps the last expert from ever being chosen, padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(TOKENS, EXPERTS, generator=generator)
    probs = logits.softmax(-1)
    shift = torch.zeros(EXPERTS)
    shift[-1] = -5.0 if bias else 0.0
    index = (probs + shift).topk(top_k).indices
    weight = probs.gather(1, index)
    valid = torch.arange(TOKENS) < TOKENS - padding
    routing = SparseRouting.from_choice(index, weight, EXPERTS, valid.unsqueeze(1).expand_as(index))
    return Decision(routing, logits, probs, {"choice": index, "valid": valid} | ({"bias": shift} if bias else {}))


def survey_of(*decisions, domains=("a", "b")):
    names = [f"layers.{number}.mlp" for number in range(len(decisions))]
    survey = Survey(names, len(domains), 5)
    tokens, domain = torch.arange(TOKENS) % 5, torch.arange(TOKENS) % len(domains)
    half = TOKENS // 2
    for part in (slice(0, half), slice(half, TOKENS)):  # in two batches
        cut = {name: [part_of(each, part)] for name, each in zip(names, decisions, strict=True)}
        survey.add(cut, tokens[part], domain[part])
    return survey, lambda: survey.result(domains, Letters)


def part_of(whole, part):
    notes = {name: note if name == "bias" else note[part] for name, note in whole.notes.items()}
    index, valid = notes["choice"], notes["valid"]
    weight = whole.probs[part].gather(1, index)
    routing = SparseRouting.from_choice(index, weight, EXPERTS, valid.unsqueeze(1).expand_as(index))
    return Decision(routing, whole.logits[part], whole.probs[part], notes)


def test_numbers_of_a_layer_equal_a_recomputation():
    whole = decision(0)
    (layer,) = survey_of(whole)[1]()["layers"]
    valid = whole.notes["valid"].tolist()
    rows = [t for t in range(TOKENS) if valid[t]]
    probs, choice = whole.probs.double().tolist(), whole.notes["choice"].tolist()
    load = Counter(expert for t in rows for expert in choice[t])
    assert layer["tokens"] == len(rows) == TOKENS - 9
    assert_close(layer["load"], [load[e] / (2 * len(rows)) for e in range(EXPERTS)], rtol=1e-5, atol=1e-9)
    mass = [sum(probs[t][e] for t in rows) / len(rows) for e in range(EXPERTS)]
    assert_close(layer["gate_mass"], mass, rtol=1e-5, atol=0)
    weight = [sum(probs[t][e] for t in rows if e in choice[t]) for e in range(EXPERTS)]
    assert_close(layer["weight_share"], [w / sum(weight) for w in weight], rtol=1e-5, atol=1e-9)
    entropies = [-sum(p * math.log(p) for p in probs[t]) for t in rows]
    assert layer["entropy"] == pytest.approx(sum(entropies) / len(rows), rel=1e-5)
    assert layer["information"] == pytest.approx(
        -sum(m * math.log(m) for m in mass) - sum(entropies) / len(rows), rel=1e-5
    )
    assert layer["never"] == [EXPERTS - 1]
    assert layer["dead"] == [EXPERTS - 1]
    assert "never routed" in layer["findings"][0]
    gaps = []
    for t in rows:
        score = [p + (-5.0 if e == EXPERTS - 1 else 0) for e, p in enumerate(probs[t])]
        rest = [s for e, s in enumerate(score) if e not in choice[t]]
        gaps.append(min(score[e] for e in choice[t]) - max(rest))
    assert layer["gap"]["mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-6)
    assert layer["gap"]["p50"] == pytest.approx(sorted(gaps)[len(gaps) // 2], rel=1e-6)
    logits = [[float(v) for v in whole.logits[t]] for t in rows]
    flat = [v for row in logits for v in row]
    assert layer["logit_rms"] == pytest.approx(math.sqrt(sum(v * v for v in flat) / len(flat)), rel=1e-6)
    assert layer["logit_max"] == pytest.approx(max(map(abs, flat)))
    squares = [math.log(sum(map(math.exp, row))) ** 2 for row in logits]
    assert layer["log_sum_square"] == pytest.approx(sum(squares) / len(squares), rel=1e-6)


def test_pairs_equal_a_recomputation():
    whole = decision(1)
    (layer,) = survey_of(whole)[1]()["layers"]
    choice = [set(row) for row in whole.notes["choice"][whole.notes["valid"]].tolist()]
    load = [sum(e in row for row in choice) for e in range(EXPERTS)]
    blind = sum(load[a] * load[b] for a in range(EXPERTS) for b in range(EXPERTS) if a != b)
    meetings = sum(len(row) * (len(row) - 1) for row in choice)
    for i, a in enumerate(layer["coactivation"]["experts"]):
        for j, b in enumerate(layer["coactivation"]["experts"]):
            alone = load[a] * load[b] * meetings / blind
            both = sum({a, b} <= row for row in choice)
            expected = both / alone if alone and a != b else 0.0
            assert layer["coactivation"]["lift"][i][j] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    best = max(
        (pair for pair in combinations(range(EXPERTS), 2)),
        key=lambda pair: layer["coactivation"]["lift"][pair[0]][pair[1]],
    )
    assert tuple(layer["coactivation"]["pairs"][0][:2]) == best


def test_the_next_layer_is_foreseen_as_a_loop_foresees_it():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(4 * BLOCK, 5, generator=generator).topk(2).indices
    following = torch.where(torch.rand(4 * BLOCK, 2, generator=generator) < 0.7, (first + 1) % 5, (first + 3) % 5)
    chosen, then = (torch.zeros(4 * BLOCK, 5).bool().scatter(1, index, True) for index in (first, following))
    found = next_layer(chosen, then)
    learns = [t for t in range(4 * BLOCK) if t // BLOCK % 2 == 0]
    tests = [t for t in range(4 * BLOCK) if t // BLOCK % 2 == 1]
    count, load = Counter(), Counter()
    for t in learns:
        for e in set(first[t].tolist()):
            load[e] += 1
            count.update((e, f) for f in set(following[t].tolist()))
    guesses = round(float(then.sum()) / len(then))
    hits = total = 0
    for t in tests:
        score = {f: sum(count[e, f] / load[e] for e in set(first[t].tolist())) for f in range(5)}
        guessed = sorted(score, key=lambda f: -score[f])[:guesses]
        hits += len(set(guessed) & set(following[t].tolist()))
        total += len(set(following[t].tolist()))
    assert found["guesses"] == guesses
    assert found["recall"] == pytest.approx(hits / total)
    assert found["recall"] > found["recall_by_load"] > 0
    assert found["chance"] == guesses / 5


def test_a_layer_that_copies_the_one_before_is_foreseen_wholly():
    whole = decision(2, padding=TOKENS // 2)
    first, second = survey_of(whole, whole)[1]()["layers"]
    assert first["next_layer"]["guesses"] == TOP_K  # padding chooses nothing and does not count
    assert first["next_layer"]["recall"] == 1.0
    assert first["next_layer"]["layer"] == second["name"]
    assert second["next_layer"] is None
    independent = survey_of(decision(2, padding=0), decision(3, padding=0))[1]()["layers"][0]["next_layer"]
    assert independent["recall"] < 0.5


def test_too_little_text_foresees_nothing():
    assert next_layer(torch.ones(BLOCK, 3).bool(), torch.ones(BLOCK, 3).bool()) is None


def test_coverage_sums_the_busiest():
    covered = coverage([0.1, 0.5, 0.0, 0.4])
    assert covered == pytest.approx([0.5, 0.9, 1.0, 1.0])
    assert [experts_for(covered, share) for share in (0.5, 0.9, 0.91)] == [1, 2, 3]


def test_blind_choices_have_lift_one():
    pairs = torch.tensor(list(combinations(range(4), 2)))
    chosen = torch.zeros(len(pairs), 4).bool().scatter(1, pairs, True)
    assert_close(coactivation(chosen), (torch.ones(4, 4) - torch.eye(4)).double())


def test_cosines_are_of_all_parts_together():
    torch.manual_seed(0)
    parts = [torch.randn(4, 3, 5), torch.randn(4, 70_000)]
    whole = [torch.cat([part[e].flatten() for part in parts]).double() for e in range(4)]
    expected = [[float(torch.cosine_similarity(a, b, dim=0)) for b in whole] for a in whole]
    assert_close(cosines(parts), torch.tensor(expected, dtype=torch.float64))
    assert cosines([]) is None


def test_output_cosines_are_the_mean_over_tokens():
    outputs = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    expected = [
        [sum(float(torch.cosine_similarity(a[t], b[t], dim=0)) for t in range(6)) / 6 for b in outputs]
        for a in outputs
    ]
    assert_close(output_cosines(outputs), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_ties_and_sick_routers_are_named():
    tied = decision(4, scale=0.0, bias=False)
    healthy = decision(5, bias=False)
    dead = decision(6, top_k=1, bias=False)
    ones = dead.routing.weight.new_ones(dead.routing.weight.shape)
    routing = SparseRouting(dead.routing.token, ones, dead.routing.offsets, TOKENS)
    dead = Decision(routing, 40 * dead.logits, dead.probs, dead.notes)
    layers = []
    for each in (tied, healthy, dead):
        survey = Survey(["layers.0"], 1, 5)
        survey.add({"layers.0": each}, torch.zeros(TOKENS).long(), torch.zeros(TOKENS).long())
        layers += survey.result(["text"], Letters)["layers"]
    assert layers[0]["tie_rate"] == 1.0
    assert layers[1]["tie_rate"] == 0.0
    words = [" ".join(layer["findings"]) for layer in layers]
    assert "silent router" in words[0]
    assert "ties: 100 %" in words[0]
    assert words[1] == ""
    assert "dead router" in words[2]
    assert "large logits" in words[2]


def test_a_survey_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no token was routed"):
        Survey(["layers.0"], 1, 5).result(["text"], Letters)
