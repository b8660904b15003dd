"""`moestro inspect` on folders of transformers and of our own: pages, numbers, refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import moestro
from moestro.cli import main
from moestro.cli.inspect import inspect_folder
from moestro.data import ByteTokenizer, Document
from moestro.data.excerpts import sample_excerpts
from moestro.hf import find_layers
from moestro.hf.pieces import StockTokenizer
from moestro.hf.subject import StockSubject, open_subject
from moestro.models import build_language_model, save_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-mixtral"
    tiny_model("mixtral", vocab_size=256, hidden=16).save_pretrained(path)
    ByteTokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "two.jsonl"
    rows = [
        {"text": "def f(x):\n    return x\n" * 8, "domain": "code"},
        {"text": "A word, é. " * 16, "domain": "prose"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_the_command_writes_a_page_and_numbers(folder, text, tmp_path, capsys):
    page = tmp_path / "new" / "tiny.html"
    arguments = ["--data", str(text), "--tokens", "256", "--sequence-length", "32"]
    assert main(["inspect", str(folder), "--out", str(page), *arguments]) == 0
    printed = capsys.readouterr().out
    assert str(page) in printed
    assert "layer 0" in printed
    found = json.loads(page.with_suffix(".json").read_text())
    content = page.read_text()
    assert "tiny-mixtral" in content
    assert "{{" not in content.split("<script>")[0]
    assert {path.name for path in page.parent.iterdir()} == {"tiny.html", "tiny.json"}
    assert main(["inspect", str(folder), "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert found["text"]["tokens_by_domain"].keys() == {"code", "prose"}
    assert len(found["layers"]) == 2
    assert found["layers"][0]["num_experts"] == 6


def test_load_equals_a_recomputation_with_stock_transformers(folder, text):
    found = inspect_folder(folder, [str(text)], tokens=256, length=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    excerpts = sample_excerpts(moestro.data.read_documents([text]), 8, 8 * 32)
    counts = [[0] * 6 for _ in range(2)]
    for excerpt in excerpts:
        ids = list(excerpt.text.encode())[:32]
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        for layer, of_layer in enumerate(logits):
            for row in of_layer.topk(2).indices.tolist():
                for expert in row:
                    counts[layer][expert] += 1
    for layer, of_layer in zip(found["layers"], counts, strict=True):
        assert_close(layer["load"], [n / sum(of_layer) for n in of_layer], rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_similarity_equals_a_recomputation(folder, text):
    found = inspect_folder(folder, [str(text)], tokens=64, length=32)
    for layer, part in zip(find_layers(open_subject(folder).model).values(), found["layers"], strict=True):
        flat = [
            torch.cat([layer.experts.gate_up_proj[e].flatten(), layer.experts.down_proj[e].flatten()])
            for e in range(6)
        ]
        expected = [[float(torch.cosine_similarity(a, b, dim=0)) for b in flat] for a in flat]
        assert_close(part["similarity_of_weights"]["matrix"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_expert_by_expert(family):
    """The answers, combined as the router decided, are what the layer computes."""
    subject = StockSubject(tiny_model(family))
    batch = tiny_batch(subject.model)
    all_valid = torch.ones_like(batch["input_ids"]).bool()
    decisions = subject.route(batch["input_ids"], all_valid, all_valid)
    for name, layer in find_layers(subject.model).items():
        answers, matrix = subject.answers(name), decisions[name][0].routing.combine_matrix()
        assert answers.shape[:2] == (layer.num_experts, batch["input_ids"].numel())
        if layer.family.output.scale == "input" or family == "nllb_moe":  # scaled before; only two experts run
            continue
        x, index = subject._inputs[name], decisions[name][0].notes["choice"]
        expected = torch.einsum("te,etw->tw", matrix.to(answers.dtype), answers)
        if not isinstance(layer.experts, nn.ModuleDict):
            weight = matrix.gather(1, index).to(x.dtype)
            assert_close(layer.experts(x, index, weight), expected, rtol=1e-4, atol=1e-5)
        assert list(subject.weights(name))


def test_our_own_models_are_inspected(tmp_path, text):
    torch.manual_seed(0)
    model = build_language_model(
        vocab_size=256, width=16, num_layers=2, num_heads=2, method="switch", num_experts=4, expert_hidden=8
    )
    save_model(model, tmp_path / "own", ByteTokenizer())
    found = inspect_folder(tmp_path / "own", [str(text)], tokens=256, length=32)
    assert found["model"]["model_type"] == "moestro"
    for layer in found["layers"]:
        assert layer["coactivation"] is None
        assert layer["similarity_of_outputs"] is not None
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-4)


def test_excerpts_are_spread_over_domains_and_repeatable():
    documents = [
        Document("x" * 1000, "one", "a"),
        Document("y" * 100, "two", "b"),
        Document("z" * 100, "three", "b"),
    ]
    picked = sample_excerpts(documents, 6, 100)
    assert [excerpt.domain for excerpt in picked] == ["a", "b", "a", "b", "a", "a"]
    assert picked == sample_excerpts(reversed(documents), 6, 100) or sorted(map(str, picked)) == sorted(
        map(str, sample_excerpts(reversed(documents), 6, 100))
    )
    assert len(sample_excerpts(documents, 1, 100)) == 2  # one of each domain at least
    with pytest.raises(ValueError, match="no text"):
        sample_excerpts([], 6, 100)


def test_the_tokenizer_tells_bytes(folder):
    tokenizer = StockTokenizer(folder)
    data = "é ↵\n".encode()
    assert tokenizer.decode_bytes(tokenizer.encode(data.decode())) == data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is nothing at"),
        (["{folder}", "--corpus", "wiki"], "no corpus 'wiki'"),
        (["{folder}", "--corpus", "default", "--data", "{text}"], "pass one of them"),
        (["{folder}", "--out", "page.pdf"], "is no .html file"),
        (["{folder}", "--data", "nowhere.txt"], "there is no file"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, folder, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word.format(folder=folder, text=text) for word in arguments]
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            "lacks 1 of the 18 expert tensors",
        ),
        (lambda t: t.pop("model.layers.0.input_layernorm.weight"), "lacks model.layers.0.input_layernorm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(23)}), "holds model.norm.weight in another shape"),
    ],
)
def test_models_that_are_not_whole_are_refused_by_name(change, message, folder, text, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert (
        main(["inspect", str(tmp_path / "model"), "--out", str(tmp_path / "page.html"), "--data", str(text)]) == 2
    )
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_gguf_is_told_to_be_converted(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["inspect", str(tmp_path / "model.gguf")]) == 2
    assert "make it a folder: moestro convert" in capsys.readouterr().err


def test_the_python_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    model = tiny_model("mixtral", vocab_size=256)
    exec(
        compile(block, "inspect.md", "exec"),
        {"model": model, "batch": tiny_batch(model), "tokenizer": ByteTokenizer()},
    )
    assert sum(json.loads(capsys.readouterr().out)) == pytest.approx(1, abs=1e-4)


def test_the_page_names_every_number(folder, text):
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    plain = {"name", "label", "tokens", "experts_per_token", "num_experts", "margin", "dropped", "constant_weight"}
    (layer, *_) = inspect_folder(folder, [str(text)], tokens=64, length=32)["layers"]
    assert all(f"`{key}`" in page for key in layer.keys() - plain)


def test_dense_and_huge_models_are_refused(tmp_path, folder, monkeypatch):
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="may be dense"):
        open_subject(tmp_path / "dense")
    monkeypatch.setattr("moestro.hf.subject.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="memory are free"):
        open_subject(folder)
