import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score
from torch.testing import assert_close

from moestro.inspect import SpecialisationCounter
from moestro.inspect.specialisation import highest_possible, lift, normalised_mutual_information, told_apart
from moestro.routing import Decision, SoftRouting, SparseRouting


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode_bytes(self, ids):
        return bytes(ids)


def choose(choice, num_experts=4, valid=None, keep=None):
    choice = torch.as_tensor(choice)
    routing = SparseRouting.from_choice(choice, torch.ones(choice.shape), num_experts, keep)
    return Decision(
        routing, notes={"choice": choice} | ({} if valid is None else {"valid": torch.as_tensor(valid)})
    )


def table_to_labels(table):
    pairs = [(a, b) for a, row in enumerate(table) for b, n in enumerate(row) for _ in range(n)]
    return [a for a, _ in pairs], [b for _, b in pairs]


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=2, max_size=4))
def test_mutual_information_is_that_of_scikit_learn(table):
    of_rows, of_columns = table_to_labels(table)
    if len(set(of_rows)) < 2 and len(set(of_columns)) < 2:
        assert normalised_mutual_information(torch.tensor(table)) == 0.0  # where we depart
        return
    expected = normalized_mutual_info_score(of_rows, of_columns, average_method="arithmetic")
    assert normalised_mutual_information(torch.tensor(table)) == pytest.approx(expected, abs=1e-9)


def test_mutual_information_on_paper():
    assert normalised_mutual_information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(1.0)
    assert normalised_mutual_information(torch.tensor([[2, 4], [3, 6]])) == pytest.approx(0.0, abs=1e-12)
    # two domains, four experts, two for each: I = ln 2, H = ln 2 and ln 4
    split = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert normalised_mutual_information(split) == pytest.approx(2 / 3)
    assert highest_possible(split) == pytest.approx(2 / 3)


def test_counts_are_exact():
    generator = torch.Generator().manual_seed(0)
    counter = SpecialisationCounter(2, 5, ["layer"])
    by_domain, by_token = torch.zeros(2, 4), torch.zeros(5, 4)
    for length in (3, 7):
        choice = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(2 * length)])
        tokens = torch.randint(5, (2, length), generator=generator)
        domain = torch.randint(2, (2, length), generator=generator)
        counter.add({"layer": choose(choice)}, tokens, domain)
        for experts, token, origin in zip(choice, tokens.flatten(), domain.flatten(), strict=True):
            for expert in experts:
                by_domain[origin, expert] += 1
                by_token[token, expert] += 1
    assert_close(counter.domain_counts["layer"], by_domain.double())
    assert_close(counter.token_counts["layer"], by_token.double())


def test_padding_is_not_counted_and_dropped_choices_are():
    counter = SpecialisationCounter(1, 3, ["layer"])
    decision = choose([[0], [1], [1]], 2, valid=[True, True, False], keep=torch.tensor([[True], [False], [False]]))
    counter.add({"layer": decision}, torch.tensor([0, 1, 2]), torch.zeros(3))
    assert counter.domain_counts["layer"].tolist() == [[1, 1]]


def test_soft_routing_counts_weights():
    combine = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).view(1, 2, 2, 1)
    routing = SoftRouting(torch.arange(2)[None], torch.full((1, 2, 1, 2), 0.5), combine, 2)
    counter = SpecialisationCounter(2, 2, ["layer"])
    counter.add({"layer": Decision(routing)}, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert counter.domain_counts["layer"].tolist() == [[0.75, 0.25], [0.5, 0.5]]


def test_a_layer_that_ran_twice_counts_twice():
    counter = SpecialisationCounter(1, 2, ["layer"])
    counter.add({"layer": [choose([[0]]), choose([[3]])]}, torch.tensor([1]), torch.tensor([0]))
    assert counter.domain_counts["layer"].tolist() == [[1, 0, 0, 1]]


def test_a_rare_token_does_not_win_by_chance():
    counts = torch.zeros(3, 10, dtype=torch.float64)
    counts[0] = 1000.0
    counts[1, 0], counts[1, 1] = 400.0, 100.0  # expert 0 really likes thing 1
    counts[2, 0] = 1.0  # seen once, with expert 0: its raw lift would be larger still
    raw = lift(counts, pseudo_count=0.0)
    assert raw[2, 0] > raw[1, 0]
    assert lift(counts)[1, 0] > 3 > 1.2 > lift(counts)[2, 0] > 1


def test_telling_apart_does_not_depend_on_how_rare_a_domain_is():
    table = torch.tensor([[30.0, 10.0], [10.0, 30.0]])
    assert told_apart(table) == pytest.approx(0.75)
    assert told_apart(table * torch.tensor([[1000.0], [1.0]])) == pytest.approx(0.75)
    assert told_apart(torch.tensor([[2, 4, 6], [1, 2, 3], [3, 6, 9]])) == pytest.approx(1 / 3)  # blind
    assert told_apart(torch.eye(4)) == 1.0


def test_a_domain_that_never_occurs_is_no_alternative():
    assert told_apart(torch.tensor([[3, 1], [0, 0], [1, 3]])) == pytest.approx(0.75)
    assert told_apart(torch.tensor([[3, 1], [0, 0]])) == 1.0


def test_blind_choice_has_lift_one():
    assert_close(lift(torch.outer(torch.tensor([10.0, 20.0]), torch.tensor([1.0, 2.0, 3.0]))), torch.ones(2, 3))


def test_result_tells_code_from_prose():
    text = b"def f(x):\n    return x\n" * 40 + b"The Quick Brown Fox Jumps. " * 40
    code = 23 * 40
    tokens = torch.tensor(list(text))
    domain = (torch.arange(len(text)) >= code).long()
    letters = torch.tensor([97 <= byte <= 122 for byte in text]).long()
    counter = SpecialisationCounter(2, 256, ["by_domain", "by_letter"])
    counter.add({"by_domain": choose(domain[:, None], 3), "by_letter": choose(letters[:, None], 3)}, tokens, domain)
    result = json.loads(json.dumps(counter.result(["code", "prose"], Bytes())))
    first, second = result["layers"]
    assert result["domains"] == ["code", "prose"]
    assert first["load_by_domain"] == [[1, 0, 0], [0, 1, 0]]
    assert first["normalised_mutual_information"] == pytest.approx(1.0)
    assert first["told_apart"] == pytest.approx(1.0)
    assert second["normalised_mutual_information"] < 0.2
    assert second["experts"][1]["top_classes"][0][0] == "lowercase letter"
    assert {text for text, _ in first["experts"][0]["top_tokens"]} & {"(", ")", ":", "␣"}
    assert first["experts"][1]["top_classes"][0][0] == "uppercase letter"
    assert first["experts"][2] == {"share": 0.0, "top_classes": [], "top_tokens": []}
    assert math.isclose(sum(expert["share"] for expert in second["experts"]), 1.0)
    assert len(second["class_lift"]) == 3


def test_wrong_sizes_are_refused():
    counter = SpecialisationCounter(2, 4, ["layer"])
    with pytest.raises(ValueError, match="routed 1 tokens but was given 2 token ids"):
        counter.add({"layer": choose([[0]])}, torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no decision of layer 'layer'"):
        counter.add({}, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="only 0 to 3 exist"):
        counter.add({"layer": choose([[0]])}, torch.tensor([4]), torch.tensor([0]))
    with pytest.raises(ValueError, match="pass one name each"):
        counter.result(["only one"], Bytes())
