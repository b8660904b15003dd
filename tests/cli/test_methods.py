"""`moestro methods`, `show` and `cite`: what is known of a method."""

import json
from pathlib import Path

import pytest

import moestro
from moestro.cli import main
from moestro.cli.parts import describe_parts, source_file
from moestro.cli.show import describe_method
from moestro.routers import TopK, softmax

SOURCE = Path(moestro.__file__).parents[1]


def output(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_methods_lists_every_registered_one(capsys):
    lines = output(capsys, "methods").splitlines()
    assert lines[0].split()[:3] == ["name", "family", "paper"]
    assert [line.split()[0] for line in lines[1:]] == list(moestro.all_methods())


def test_methods_for_machines(capsys):
    found = {row["name"]: row for row in json.loads(output(capsys, "methods", "--json"))}
    assert list(found) == list(moestro.all_methods())
    assert found["switch"]["options"]["capacity_factor"] == {"type": "float", "required": False, "default": 1.25}
    assert found["hash-layers"]["options"]["vocab_size"]["required"]
    assert (found["switch"]["year"], found["switch"]["arxiv"]) == (2021, "2101.03961")
    assert (SOURCE / found["switch"]["file"]).is_file()


def test_methods_of_a_family(capsys):
    rows = json.loads(output(capsys, "methods", "--json", "--family", "soft"))
    assert {"soft-moe", "mixture-of-tokens"} <= {row["name"] for row in rows}
    assert {row["family"] for row in rows} == {"soft"}


@pytest.mark.parametrize("name", moestro.all_methods())
def test_show_prints_the_parts_of_every_method(name, capsys):
    text = output(capsys, "show", name, *(f"--options.{key}={value}" for key, value in needed(name).items()))
    moe = moestro.build(name, width=64, hidden=128, num_experts=16, **needed(name))
    method = moestro.all_methods()[name]
    paper = f"{method.paper}, arXiv:{method.arxiv}" if method.arxiv else method.paper
    assert text.startswith(f"{name}  {paper}  moestro/methods/")
    for part in (moe.router, moe.experts, *([moe.shared] if moe.shared else [])):
        assert type(part).__name__ in text
    for option in method.options:
        assert f"{option}: " in text
    for loss, (coefficient, _) in moe.losses.items():
        assert f"{loss} = {coefficient} * " in text
    assert ("controllers: none" in text) is (not moe.controllers)


@pytest.mark.parametrize("name", moestro.all_methods())
def test_every_part_is_where_show_says(name):
    facts = describe_method(name, width=64, hidden=128, num_experts=16, **needed(name))

    def walk(parts):
        for part in parts:
            if part["file"].startswith("moestro/"):  # not what torch or Python define
                assert part["name"] in (SOURCE / part["file"]).read_text()
            walk(part["parts"])

    walk([*facts["parts"], *facts["losses"].values(), *facts["controllers"]])
    json.dumps(facts)  # plain values


def test_show_takes_sizes_and_options(capsys):
    words = ("show", "mixtral", "--options.top-k", "3", "--num-experts", "5", "--json")
    facts = json.loads(output(capsys, *words))
    select = next(part for part in facts["parts"][0]["parts"] if part["slot"] == "select")
    assert (select["name"], select["settings"]) == ("TopK", "k=3")
    assert facts["options"]["top_k"]["value"] == 3
    assert facts["parts"][1]["parameters"]["gate"] == [5, 64, 128]


def test_the_slots_of_a_token_choice_router_come_in_the_order_of_a_token():
    moe = moestro.build("switch", width=8, hidden=8, num_experts=4)
    slots = [part.slot for part in describe_parts(moe)[0].parts]
    assert slots == ["scorer", "noise", "gate", "select", "weigh", "capacity"]


def test_files_are_named_from_their_package_on():
    assert source_file(TopK) == "moestro/routers/selects.py"
    assert source_file(softmax) == "moestro/routers/gates.py"


def test_cite_prints_bibtex(capsys):
    entries = output(capsys, "cite", "switch", "mixtral").strip().split("\n\n")
    assert [entry.split("{")[0] for entry in entries] == ["@misc", "@misc"]
    assert "eprint = {2101.03961}" in entries[0]


def needed(name: str) -> dict[str, int]:
    sizes = {"vocab_size": 256, "num_domains": 2}
    return {size: number for size, number in sizes.items() if size in moestro.all_methods()[name].options}
