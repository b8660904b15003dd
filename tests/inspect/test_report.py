import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from oracles.synthetic_run import make_run

from moestro.inspect import write_report
from moestro.inspect.history import layer_labels
from moestro.inspect.reduce import pooled, smoothed
from moestro.inspect.runfolder import number, read_run
from moestro.inspect.story import comparison, count, notices, verdict

pytest.importorskip("plotly")


class Page(HTMLParser):
    """What a browser would see: tags, attributes, words and the data of the pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.specs, self._inside = [], [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._inside = dict(attributes).get("type", tag)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "application/json":
            self.specs.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.words += " ".join(data.split()) + " "


def page_of(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "first", steps=100)


def test_a_finished_run_has_every_part(run):
    page = page_of(run)
    assert write_report(run) == run / "report.html"
    kinds = [[trace["type"] for trace in spec["data"]] for spec in page.specs]
    assert (
        kinds
        == [["scatter"] * 4, ["scatter"] * 2]
        + [["heatmap"]] * 4
        + [["bar"]] * 4
        + [["scatter"] * 4] * 2
        + [["heatmap"]] * 4
    )
    for words in (
        "1.852",
        "1.882",
        "−0.030",
        "1.6 %",
        "11 850",
        "1.81 M",
        "No expert is dead",
        "NMI 0.230",
        "2.13.0",
    ):
        assert words in page.words, words
    assert not list(run.glob("*.tmp"))


def test_the_page_says_whether_experts_tell_kinds_of_text_apart(run):
    file = run / "specialisation.json"
    content = json.loads(file.read_text())
    right = 100 * content["layers"][-1]["told_apart"]
    assert f"separates best: {right:.1f} % right, NMI 0.230" in page_of(run).words
    for layer in content["layers"]:
        layer["told_apart"] = 0.51
    file.write_text(json.dumps(content))
    assert "No layer tells them apart" in page_of(run).words
    for layer in content["layers"]:  # written by an older version
        del layer["told_apart"]
    file.write_text(json.dumps(content))
    assert "separates best, with NMI 0.230" in page_of(run).words


def test_the_page_asks_nothing_of_the_network(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not [found for found in page.attributes if found[1] in ("src", "srcset", "action", "background")]
    assert [found for found in page.attributes if found[1] == "href"] == [("link", "href", "data:,")]
    assert "default-src 'none'" in text
    assert page.tags.count("script") == len(page.specs) + 2  # plotly.js once, and our few lines
    assert not re.search(r"@import|url\(", text[: text.index("</style>")])


def test_dead_experts_are_named(tmp_path):
    page = page_of(make_run(tmp_path / "run", dead=True))
    assert "1 expert is dead at the end." in page.words
    assert "dead: 5" in page.words
    bars = [spec["data"][0] for spec in page.specs if spec["data"][0]["type"] == "bar"]
    assert [bar["text"].count("dead") for bar in bars] == [0, 1, 0, 0]


def test_the_load_at_the_end_is_that_of_the_validation_text(run):
    content = json.loads((run / "specialisation.json").read_text())["layers"]
    bars = [spec["data"][0]["y"] for spec in page_of(run).specs if spec["data"][0]["type"] == "bar"]
    for layer, bar in zip(content, bars, strict=True):
        assert bar == pytest.approx([100 * expert["share"] for expert in layer["experts"]], rel=1e-4)
    (run / "specialisation.json").unlink()
    page = page_of(run)
    load = json.loads((run / "routing.jsonl").read_text().splitlines()[-1])["layers"][3]["load"]
    assert [spec for spec in page.specs if spec["data"][0]["type"] == "bar"][3]["data"][0]["y"] == pytest.approx(
        [100 * share for share in load], rel=1e-4
    )
    assert "No expert is dead at step 100." in page.words


def test_domain_columns_carry_the_shares_of_the_file(run):
    content = json.loads((run / "specialisation.json").read_text())["layers"][2]["load_by_domain"]
    spec = page_of(run).specs[-2]["data"][0]
    shown = dict(zip(spec["y"], spec["z"], strict=True))
    for expert, row in shown.items():
        assert row == pytest.approx([100 * shares[int(expert)] for shares in content], rel=1e-4)
    ratios = [code / prose for code, prose in spec["z"]]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["twin"], "no dense twin"),
        (["specialisation.json"], "Specialisation has not been measured yet"),
        (["routing.jsonl"], "No routing was recorded"),
        (["evaluations.jsonl", "twin/evaluations.jsonl", "result.json"], "No validation was measured"),
        (["metrics.jsonl"], "No training loss was recorded"),
        (["result.json"], "unfinished or was interrupted"),
        (["recipe.yaml"], "1.852"),
        (["recipe.yaml", "result.json", "evaluations.jsonl", "routing.jsonl"], "a training run"),
        (["metrics.jsonl", "result.json", "evaluations.jsonl", "routing.jsonl", "twin"], "neither a recipe"),
    ],
)
def test_missing_parts_are_said_in_words(run, missing, words):
    for name in missing:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if words == "neither a recipe":
        (run / "recipe.yaml").write_text("")
    assert words in page_of(run).words


def test_an_interrupted_run_says_where_it_stopped(run):
    shutil.rmtree(run / "twin")
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:40]) + lines[40][:17])  # a torn last line
    for name in ("evaluations.jsonl", "routing.jsonl"):
        (run / name).unlink()
    assert notices(read_run(run)) == ["The run stopped at step 40 of 100; this page shows that part."]
    assert "stopped at step 40 of 100" in page_of(run).words


def test_a_dense_run_has_no_experts_to_show(run):
    (run / "recipe.yaml").write_text("twin: false\nmodel: {method: null}\ntrain: {steps: 100}\n")
    shutil.rmtree(run / "twin")
    for name in ("routing.jsonl", "specialisation.json"):
        (run / name).unlink()
    page = page_of(run)
    assert "the dense model needs 1.852 bits" in page.words
    assert "it has no experts and no router" in page.words
    assert "difference" not in page.words


def test_damaged_files_are_reported_and_survived(run):
    (run / "result.json").write_text("{broken")
    (run / "twin" / "result.json").write_text("[1, 2]")
    (run / "recipe.yaml").write_text("model: [\n")
    (run / "specialisation.json").write_text('{"domains": 3, "layers": [7, {"load_by_domain": [[1], 2]}]}')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('nonsense\n[1]\n{"step": "x"}\n{"step": 101, "loss": NaN}\n')
    with open(run / "routing.jsonl", "a") as file:
        bad = [{"name": "layers.0.moe", "load": [0.5, "x"]}, 3, {"load": []}]
        file.write(json.dumps({"step": 110, "layers": bad}) + '\n{"step": 120, "layers": 5}\n')
    words = page_of(run).words
    for sentence in (
        "result.json is damaged",
        "twin/result.json is damaged",
        "recipe.yaml is damaged",
        "metrics.jsonl: 3 unreadable line(s) were left out",
    ):
        assert sentence in words


def test_text_from_files_never_becomes_markup(run):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}"
    content = json.loads((run / "specialisation.json").read_text())
    content["domains"] = [evil, "prose"]
    for layer in content["layers"]:
        layer["experts"][0]["top_tokens"] = [[evil, 9.0]]
        layer["experts"][0]["top_classes"] = [[evil, 9.0]]
    (run / "specialisation.json").write_text(json.dumps(content))
    (run / "recipe.yaml").write_text(json.dumps({"model": {"method": evil}, evil: evil}))
    (run / "result.json").write_text(json.dumps({evil: evil, "versions": {evil: evil}}))
    records = [json.loads(line) for line in (run / "routing.jsonl").read_text().splitlines()]
    for record in records:
        record["layers"][0]["name"] = evil
    (run / "routing.jsonl").write_text("\n".join(map(json.dumps, records)))
    renamed = run.rename(run.with_name("<b>run"))
    text = write_report(renamed).read_text(encoding="utf-8")
    page = Page(text)
    assert "img" not in page.tags
    assert page.tags.count("script") == len(page.specs) + 2
    assert "<script>alert" not in text
    assert "{{ 7*7 }}" in page.words
    ticks = [spec["data"][0]["x"] for spec in page.specs if spec["data"][0]["type"] == "heatmap"][-1]
    assert "<" not in ticks[0]  # plotly reads a little HTML in labels


def test_twins_are_compared_at_equal_steps(run):
    evaluations = [{"step": 50, "bits_per_byte": 2.5}, {"step": 100, "bits_per_byte": 1.852}]
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, evaluations)))
    (run / "twin" / "evaluations.jsonl").write_text(json.dumps({"step": 50, "bits_per_byte": 2.4}) + "\n")
    assert comparison(read_run(run)) == (1.852, 1.882)  # both finished
    (run / "twin" / "result.json").unlink()
    assert comparison(read_run(run)) == (2.5, 2.4)
    assert "the experts cost 0.100 bits a byte, or 4.2 %" in verdict(read_run(run))


def test_a_resumed_run_keeps_the_last_record_of_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 9}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 1}\n'
    )
    assert read_run(tmp_path).metrics == [{"step": 1, "loss": 3}, {"step": 2, "loss": 1}]


def test_any_other_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run folder; pass one that `moestro train --out` wrote"):
        write_report(tmp_path)


def test_long_curves_are_averaged_not_cut():
    steps, means = pooled(list(range(1, 1001)), [[float(i)] for i in range(1000)], 100)
    assert (len(steps), steps[0], steps[-1]) == (100, 10, 1000)
    assert means[0] == [4.5]
    assert pooled([1, 2, 3], [[1.0], [3.0], [8.0]], 2) == ([2, 3], [[2.0], [8.0]])  # the last group is smaller
    assert smoothed([5.0] * 200) == pytest.approx([5.0] * 200)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]


@pytest.mark.parametrize("value", [None, True, "3", [1], float("nan"), float("inf"), 10**400])
def test_only_finite_numbers_are_numbers(value):
    assert number(value) is None
    assert number(3) == 3.0


def test_numbers_and_names_are_short():
    assert [count(value) for value in (None, 0.5, 987.0, 12_400.0, 5_640_000.0, 2.5e9)] == [
        "–",
        "0.5",
        "987",
        "12 400",
        "5.64 M",
        "2.5 G",
    ]
    assert layer_labels(["layers.0.moe", "layers.2.moe"]) == ["layer 0", "layer 2"]
    assert layer_labels(["a.0.x", "b.0.x"]) == ["a.0.x", "b.0.x"]
    assert layer_labels(["moe"]) == ["moe"]
