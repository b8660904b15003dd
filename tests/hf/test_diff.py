"""`moestro diff` of models and of traces: every number against a straightforward recomputation, and refusals."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_model
from torch.testing import assert_close

import moestro
from moestro.cli import main
from moestro.cli.diff import compare_folders, compare_traces
from moestro.data import ByteTokenizer, read_documents
from moestro.data.excerpts import sample_excerpts
from moestro.hf import find_layers
from moestro.hf.convert import convert
from moestro.hf.differences import weight_differences
from moestro.inspect.difference import LayerRoutes, difference, routing_difference
from moestro.inspect.difference_page import render_difference_page, verdict
from moestro.models import build_language_model, save_model
from moestro.routing import Decision, SoftRouting

transformers = pytest.importorskip("transformers")
pytest.importorskip("plotly")
SIZES = {"vocab_size": 256, "hidden": 16, "num_experts": 5}


@torch.no_grad()
def moved(model, seed=1):
    """The same model with other experts and routers; expert 1 of the first layer stays, one embedding moves."""
    torch.manual_seed(seed)
    for number, layer in enumerate(find_layers(model).values()):
        keep = [parameter[1].clone() for parameter in layer.experts.parameters()]
        for parameter in [*layer.experts.parameters(), *layer.router.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
        if number == 0:
            for parameter, before in zip(layer.experts.parameters(), keep, strict=True):
                parameter[1] = before
    model.get_input_embeddings().weight[7] += 1
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one architecture and their tokenizer."""
    top = tmp_path_factory.mktemp("models")
    tiny_model("mixtral", **SIZES).save_pretrained(top / "before")
    moved(tiny_model("mixtral", **SIZES)).save_pretrained(top / "after")
    for name in ("before", "after"):
        ByteTokenizer().save(top / name)
    return top / "before", top / "after"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("def f(x):\n    return x\n" * 8 + "A word, é. " * 16)
    return path


def choices_of(folder, text):
    """Sets of chosen experts by layer and token, by stock transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sets, probs = [[], []], [[], []]
    for excerpt in sample_excerpts(read_documents([text]), 8, 8 * 32):
        ids = list(excerpt.text.encode())[:32]
        for layer, logits in enumerate(model(torch.tensor([ids]), output_router_logits=True).router_logits):
            sets[layer] += [set(row) for row in logits.topk(2).indices.tolist()]
            probs[layer] += logits.detach().double().softmax(-1).tolist()
    return sets, probs


def test_routing_equals_a_recomputation_with_stock_transformers(folders, text):
    found = compare_folders(*folders, [str(text)], tokens=256, length=32)
    (a, p), (b, q) = (choices_of(folder, text) for folder in folders)
    assert found["text"]["tokens"] == len(a[0])
    for number, layer in enumerate(found["layers"]):
        pairs = list(zip(a[number], b[number], strict=True))
        share_a, share_b = ([sum(e in s for s in of[number]) / len(pairs) for e in range(5)] for of in (a, b))
        assert 0.3 < layer["agreement"] < 1
        assert layer["agreement"] == pytest.approx(sum(len(x & y) / 2 for x, y in pairs) / len(pairs))
        assert layer["same_set"] == pytest.approx(sum(x == y for x, y in pairs) / len(pairs))
        assert layer["blind"] == pytest.approx(sum(x * y for x, y in zip(share_a, share_b, strict=True)) / 2)
        assert_close(layer["load_a"], [x / 2 for x in share_a], rtol=1e-5, atol=1e-9)
        moved_load = sum(abs(x - y) / 2 for x, y in zip(share_a, share_b, strict=True)) / 2
        assert layer["load_shift"] == pytest.approx(moved_load)
        shared, divergence = [], []
        for x, y, u, v in zip(a[number], b[number], p[number], q[number], strict=True):
            weight = [{e: of[e] / sum(of[i] for i in s) for e in s} for s, of in ((x, u), (y, v))]
            shared.append(sum(min(weight[0][e], weight[1][e]) for e in x & y))
            middle = [(m + n) / 2 for m, n in zip(u, v, strict=True)]
            divergence.append(sum(m * math.log(m / c) for m, c in zip(u, middle, strict=True)) / 2)
            divergence[-1] += sum(n * math.log(n / c) for n, c in zip(v, middle, strict=True)) / 2
        assert layer["shared_weight"] == pytest.approx(sum(shared) / len(shared), rel=1e-4)
        assert layer["divergence"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-4)


@torch.no_grad()
def test_weights_equal_a_recomputation(folders):
    found = weight_differences(*folders)
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    for (name, one), other in zip(find_layers(a).items(), find_layers(b).values(), strict=True):
        layer = found["layers"][name.rpartition(".")[0]]
        for expert in range(5):
            x, y = (
                torch.cat([each.experts.gate_up_proj[expert].flatten(), each.experts.down_proj[expert].flatten()])
                for each in (one, other)
            )
            assert layer["experts"]["distance"][expert] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)
            cosine = float(torch.cosine_similarity(x, y, dim=0))
            assert layer["experts"]["cosine"][expert] == pytest.approx(cosine, rel=1e-4)
            x, y = one.experts.down_proj[expert], other.experts.down_proj[expert]
            down = float((y - x).norm() / x.norm())
            assert layer["experts"]["by_matrix"]["down"][expert] == pytest.approx(down, rel=1e-4)
        x, y = one.router.weight, other.router.weight
        assert layer["router"]["distance"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)
        assert_close(layer["router"]["rows"], ((y - x).norm(dim=1) / x.norm(dim=1)).tolist(), rtol=1e-4, atol=1e-6)
    assert found["layers"]["model.layers.0"]["experts"]["distance"][1] == 0
    x, y = (model.model.embed_tokens.weight for model in (a, b))
    ((name, distance),) = found["tensors"]["changed"]
    assert name == "model.embed_tokens.weight"
    assert distance == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)


def test_the_layout_of_the_experts_does_not_matter(folders, tmp_path):
    convert(folders[1], tmp_path / "fused", "fused")
    assert weight_differences(folders[0], tmp_path / "fused") == weight_differences(*folders)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compared(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        layer = list(find_layers(model).values())[-1]
        next(layer.router.parameters()).mul_(1.5)
        if layer.bias is not None:
            layer.bias.add_(0.25)
    model.save_pretrained(tmp_path / "b")
    found = weight_differences(tmp_path / "a", tmp_path / "b")
    assert len(found["layers"]) == len(find_layers(model))
    assert all(value == 0 for each in found["layers"].values() for value in each["experts"]["distance"])
    *others, last = (each["router"] for each in found["layers"].values())
    assert last["distance"] == pytest.approx(0.5, rel=1e-5)
    assert last["cosine"] == pytest.approx(1, rel=1e-5)
    assert all(router["distance"] == 0 for router in others)
    assert last["bias"] == (None if layer.bias is None else pytest.approx(0.25, rel=1e-5))


def test_traces_equal_a_recomputation(tmp_path):
    model = tiny_model("deepseek_v3")
    batch = tiny_batch(model, padding=3)
    log = moestro.watch(model)
    for name in ("a", "b"):
        with log.record(tmp_path / name):
            model(**batch)
        moved(model)
    found = compare_traces(tmp_path / "a", tmp_path / "b")
    assert found["text"]["tokens"] == 15
    one, other = (moestro.hf.load_trace(tmp_path / name) for name in ("a", "b"))
    for layer in found["layers"]:
        x, y = (trace.layers[layer["name"]] for trace in (one, other))
        sets = [(set(s), set(t)) for s, t in zip(x.index.tolist(), y.index.tolist(), strict=True)]
        assert layer["agreement"] == pytest.approx(sum(len(s & t) / 2 for s, t in sets) / len(sets))
        shared = []
        for s, v, t, w in zip(x.index, x.weight.float(), y.index, y.weight.float(), strict=True):
            u = dict(zip(s.tolist(), (v / v.sum()).tolist(), strict=True))
            z = dict(zip(t.tolist(), (w / w.sum()).tolist(), strict=True))
            shared.append(sum(min(u[e], z[e]) for e in u.keys() & z.keys()))
        assert layer["shared_weight"] == pytest.approx(sum(shared) / len(shared), rel=1e-5)
        assert (layer["divergence"], layer["experts"]) == (None, None)
    same = compare_traces(tmp_path / "a", tmp_path / "a")
    assert verdict(same) == "Every token chose the same experts."


def test_experts_that_die_and_come_to_life_are_named():
    a, b = LayerRoutes(4), LayerRoutes(4)
    a.add_choices(torch.tensor([[0], [0], [1], [2]]), torch.ones(4, 1))
    b.add_choices(torch.tensor([[0], [0], [1], [3]]), torch.ones(4, 1))
    found = difference(["layers.0.moe"], {"layers.0.moe": routing_difference(a, b)}, {})
    assert found["layers"][0]["died"] == [2]
    assert found["layers"][0]["revived"] == [3]
    assert found["findings"] == [
        "layer 0: expert 2 died: dead in B, not in A",
        "layer 0: expert 3 came to life: dead in A, not in B",
    ]


def test_dropped_choices_carry_no_weight():
    a, b = LayerRoutes(3), LayerRoutes(3)
    index, weight = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    a.add_choices(index, weight)
    b.add_choices(index, weight, torch.tensor([[True, False], [True, True]]))
    found = routing_difference(a, b)
    assert found["agreement"] == 1
    assert found["shared_weight"] == 0.75


def test_probabilities_with_nothing_in_common_diverge_by_ln_2():
    a, b = LayerRoutes(2), LayerRoutes(2)
    for routes, probs in ((a, [1.0, 0.0]), (b, [0.0, 1.0])):
        weight = torch.tensor([probs])
        routing = SoftRouting(torch.zeros(1, 1).long(), torch.ones(1, 2, 1, 1), weight.view(1, 1, 2, 1), 1)
        routes.add(Decision(routing, None, weight))
    found = routing_difference(a, b)
    assert found["divergence"] == pytest.approx(math.log(2))
    assert found["agreement"] is None  # every token meets every expert
    assert found["load_shift"] == 1


def test_the_command_writes_a_page_and_numbers(folders, text, tmp_path, capsys):
    arguments = [*map(str, folders), "--data", str(text), "--tokens", "256", "--sequence-length", "32"]
    page = tmp_path / "new" / "change.html"
    assert main(["diff", *arguments, "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "layer 1" in printed
    assert "1 of 5 experts have the same weights in both: 1" in printed
    content, found = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert "before → after" in content
    assert "{{" not in content.split("<script>")[0]
    assert main(["diff", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert {path.name for path in page.parent.iterdir()} == {"change.html", "change.json"}


def test_weights_alone_need_no_tokenizer(folders, tmp_path, capsys):
    for number, folder in enumerate(folders):
        shutil.copytree(folder, tmp_path / str(number), ignore=shutil.ignore_patterns("token*"))
    words = ["diff", str(tmp_path / "0"), str(tmp_path / "1"), "--weights-only", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] is None
    assert found["layers"][0]["agreement"] is None
    assert "Nothing was run" in render_difference_page(found)


def test_tensors_that_one_model_lacks_are_named(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "a")
    tiny_model("mixtral", tie_word_embeddings=True, num_key_value_heads=4).save_pretrained(tmp_path / "b")
    found = compare_folders(tmp_path / "a", tmp_path / "b", run=False)
    assert found["tensors"]["only_in_a"] == ["lm_head.weight"]
    assert found["tensors"]["only_in_b"] == []
    shapes = {name: (a, b) for name, a, b in found["tensors"]["other_shape"]}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == ([12, 24], [24, 24])
    page = render_difference_page(found)
    assert "lm_head.weight" in page
    assert "[12, 24]" in page


def test_numbers_of_another_dtype_are_compared(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "a")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "b")
    found = weight_differences(tmp_path / "a", tmp_path / "b")
    assert ["lm_head.weight", "F32", "BF16"] in found["tensors"]["other_dtype"]
    assert all(0 < value < 4e-3 for value in found["layers"]["model.layers.0"]["experts"]["distance"])


def test_a_number_that_is_not_finite_is_null(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        next(iter(find_layers(model).values())).experts.down_proj[2, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "b")
    found = compare_folders(tmp_path / "a", tmp_path / "b", run=False)
    assert found["layers"][0]["experts"]["distance"][2] is None
    assert "NaN" not in json.dumps(found)
    assert "nan" not in render_difference_page(found).split("<script>")[0].split("</style>")[1].lower()


def test_our_own_models_are_compared(tmp_path, text):
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 256, "width": 16, "num_layers": 2, "num_heads": 2}
        model = build_language_model(**sizes, method="switch", num_experts=4, expert_hidden=8)
        save_model(model, tmp_path / name, ByteTokenizer())
    found = compare_folders(tmp_path / "a", tmp_path / "b", [str(text)], tokens=256, length=32)
    for layer in found["layers"]:
        assert 0 <= layer["agreement"] < 1
        assert all(1 < value < 2 for value in layer["experts"]["distance"])  # unrelated weights: about sqrt 2
        assert layer["router"]["cosine"] < 0.5


def test_the_page_of_the_documentation_names_every_number(folders):
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    found = compare_folders(*folders, run=False)
    keys = {*found["layers"][0], *found["layers"][0]["experts"], *found["layers"][0]["router"], *found["tensors"]}
    assert all(f"`{key}`" in page for key in keys - {"name", "label", "findings"})


def refusals(folders, tmp_path):
    """Two words for the command and what it answers, by what is wrong."""
    tiny_model("olmoe", vocab_size=256).save_pretrained(tmp_path / "olmoe")
    tiny_model("mixtral", vocab_size=256, hidden=16).save_pretrained(tmp_path / "six")
    tiny_model("mixtral", **{**SIZES, "num_hidden_layers": 1}).save_pretrained(tmp_path / "short")
    shutil.copytree(folders[1], tmp_path / "other-tokens")
    tokenizer = json.loads((folders[1] / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "other-tokens" / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny_model("mixtral", **SIZES, max_position_embeddings=16).save_pretrained(tmp_path / "near")
    ByteTokenizer().save(tmp_path / "near")
    traces = []
    for family, length in (("mixtral", 9), ("mixtral", 8), ("olmoe", 9)):
        model = tiny_model(family)
        traces.append(tmp_path / f"trace-{family}-{length}")
        with moestro.watch(model).record(traces[-1]):
            model(**tiny_batch(model, length=length))
    model = tiny_model("mixtral")
    with moestro.watch(model).record(tmp_path / "trace-other"):
        model(**tiny_batch(model, seed=1))
    before = folders[0]
    return {
        "a mixtral model and": (before, tmp_path / "olmoe"),
        "has 5 experts in": (before, tmp_path / "six"),
        "has experts in model.layers.1": (before, tmp_path / "short"),
        "cut the same text into other tokens": (before, tmp_path / "other-tokens"),
        "takes at most 16 tokens": (before, tmp_path / "near"),
        "is a trace and": (before, traces[0]),
        "the traces are of 18 and 16 tokens": (traces[0], traces[1]),
        "the traces are of two models: model_type": (traces[0], traces[2]),
        "token 0 differs": (traces[0], tmp_path / "trace-other"),
        "there is nothing at": (before, tmp_path / "nowhere"),
    }


def test_what_cannot_be_compared_is_refused_in_one_sentence(folders, text, tmp_path, capsys, monkeypatch):
    cases = refusals(folders, tmp_path)
    capsys.readouterr()  # progress bars of transformers
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for message, (a, b) in cases.items():
        data = [] if "trace" in str(b) else ["--data", str(text)]
        assert main(["diff", str(a), str(b), *data]) == 2, message
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
        assert error.count("error: ") == 1  # behind the progress bars of transformers
    both = list(map(str, folders))
    for words, message in (
        ([*both, "--out", "page.pdf"], "is no .html file"),
        ([*both, "--weights-only", "--data", str(text)], "reads no text"),
        ([*map(str, cases["token 0 differs"]), "--weights-only"], "traces hold choices and nothing else"),
    ):
        assert main(["diff", *words]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())
