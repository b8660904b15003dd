"""Every transport sends exactly the bytes of its closed form, forward and backward, over each kind of link."""

from collections import Counter
from math import comb
from typing import Any

import pytest
from oracles.ranks import run_ranks
from oracles.wire_bytes import WIDTH, Form

TRANSPORTS = [
    "linear", "capacity", "capacity 40", "two-level", "leader", "chunked", "pairwise", "pairwise 2", "deduplicated",
    "gather", "data-centric", "adaptive", "shadow", "shadow 1e15",
]  # fmt: skip


def case(
    transport: str, load: str, ranks: int = 4, per_node: int = 2, number: int = 4, **more: Any
) -> dict[str, Any]:
    sizes = {"ranks": ranks, "per_node": per_node, "experts": 8, "top_k": 3, "tokens": 8, "bytes": number}
    return {"transport": transport, "load": load, **sizes, **more}


FOUR = [case(t, load, number=b) for t in TRANSPORTS for load, b in (("uneven", 4), ("random", 2))]
FOUR += [case(t, "random", per_node=per) for t in ("two-level", "leader", "deduplicated") for per in (1, 4)]
FOUR += [case("drop-copies linear", "even", tokens=16, copies=2), case("linear", "even", tokens=16)]
EIGHT = [
    case(t, "random", ranks=8, per_node=per)
    for t in ("linear", "two-level", "leader", "deduplicated")
    for per in (2, 4)
]


def measured(cases: list[dict[str, Any]], ranks: int) -> list[list[dict[str, Any]]]:
    return run_ranks("oracles.wire_bytes:measure", ranks, cases, seconds=100)


def counter(rows: list[list[Any]]) -> Counter[tuple[str, str, str]]:
    return Counter({tuple(key): n for *key, n in rows})


def wrong(cases: list[dict[str, Any]], answers: list[list[dict[str, Any]]]) -> list[str]:
    found = []
    for number, each in enumerate(cases):
        form = Form(each)
        for rank, answer in enumerate(answers):
            got, wanted = counter(answer[number]["bytes"]), form.at(rank)
            if got != wanted:
                found.append(f"{each} rank {rank}: {dict(got - wanted)} too much, {dict(wanted - got)} too little")
    return found


def between_nodes(
    answers: list[list[dict[str, Any]]], number: int, what: str = "bytes", phase: str = "forward"
) -> int:
    rows = [row for answer in answers for row in answer[number][what]]
    names = ("dispatch", "combine", "experts")
    return sum(n for name, when, link, n in rows if link == "inter" and when == phase and name in names)


def test_four_ranks_send_what_the_closed_forms_say() -> None:
    answers = measured(FOUR, 4)
    assert not wrong(FOUR, answers)
    copied, plain = (between_nodes(answers, n) for n in (len(FOUR) - 2, len(FOUR) - 1))
    assert copied * 2 == plain  # each of two ranks with the same tokens sends its half


def test_eight_ranks_send_what_the_closed_forms_say() -> None:
    answers = measured(EIGHT, 8)
    assert not wrong(EIGHT, answers)
    for number, each in enumerate(EIGHT[:2]):
        nodes, per_node = 8 // each["per_node"], each["per_node"]
        linear, two_level, leader, deduplicated = range(number, len(EIGHT), 2)
        assert between_nodes(answers, linear) == between_nodes(answers, two_level) == between_nodes(answers, leader)
        assert between_nodes(answers, deduplicated) < between_nodes(answers, linear)
        # dispatch and combine: of a rank with every other node, of a node with every other node
        assert between_nodes(answers, two_level, "messages") == 2 * 8 * (nodes - 1)
        assert between_nodes(answers, leader, "messages") == 2 * nodes * (nodes - 1)
        assert between_nodes(answers, linear, "messages") == 2 * 8 * (nodes - 1) * per_node


def test_a_token_is_sent_to_as_many_nodes_as_expected() -> None:
    """Choosing k of E without preference: N (1 - C(E - E/N, k) / C(E, k)) nodes, less one's own."""
    many = case("deduplicated", "random", ranks=8, per_node=2, tokens=2000)
    form = Form(many)
    sent = sum(form.deduplicated(rank)["dispatch", "forward", "inter"] for rank in range(8)) / form.row
    tokens = sum(map(len, form.choices))
    expected = 3 * (1 - comb(6, 3) / comb(8, 3))
    assert sent / tokens == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("hidden", "better"), [(2, "data-centric"), (64, "linear")])
def test_experts_travel_where_rows_weigh_more(hidden: int, better: str) -> None:
    """2 G T k d against E w_e, both times (N - 1) / N and the bytes of a number, per node and layer."""
    cases = {t: Form(case(t, "even", tokens=16, hidden=hidden)) for t in ("linear", "data-centric")}
    per_node = {
        name: sum(n for (_, _, link), n in form.at(0).items() if link == "inter") - _counts(form)
        for name, form in cases.items()
    }
    tokens, experts = 2 * 2 * 16 * 3 * WIDTH * 4 // 2, 8 * 2 * WIDTH * hidden * 4 // 2  # N = G = 2
    # forward and backward of one of the two ranks of a node, all alike
    assert per_node == {"linear": tokens, "data-centric": experts}
    assert min(per_node, key=lambda name: per_node[name]) == better


def _counts(form: Form) -> int:
    return form.at(0)["counts", "forward", "inter"]
