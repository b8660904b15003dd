"""`moestro quantise`: from a model to a smaller one that generates, or one clear sentence."""

import json

import pytest
import torch
from oracles.tiny_models import tiny_model

from moestro.cli import main
from moestro.data import ByteTokenizer
from moestro.models import load_model, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(tiny_model("olmoe", vocab_size=ByteTokenizer().vocab_size), path, ByteTokenizer())
    return path


def run(words, capsys):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("bits", [8, 4])
def test_quantises_says_every_error_and_generates(bits, folder, tmp_path, capsys):
    code, out, err = run(["quantise", folder, tmp_path / "small", "--bits", bits, "--group", 32], capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 1 + 3 * 5 + 1 + 1
    assert lines[1].startswith("layers.0.attention.qkv.weight")
    assert f"16 tensors in {bits} bits" in lines[-1]
    code, out, _ = run(["generate", tmp_path / "small", "ab", "--max-new-tokens", 5], capsys)
    assert code == 0
    assert out.startswith("ab")


def test_errors_for_machines(folder, tmp_path, capsys):
    words = [
        "quantise",
        folder,
        tmp_path / "small",
        "--bits",
        8,
        "--keep",
        "*.attention.*",
        "head.weight",
        "--json",
    ]
    code, out, _ = run(words, capsys)
    found = json.loads(out)
    assert code == 0
    assert found["bytes"] < found["bytes_before"]
    assert {each["name"].split(".")[2] for each in found["tensors"]} == {"moe"}
    assert isinstance(load_model(tmp_path / "small").head, torch.nn.Linear)


def test_wrong_requests_get_one_sentence_and_write_nothing(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for words, message in (
        ([folder, tmp_path / "small", "--bits", 3], "quantised to 8 or 4 bits"),
        ([folder, tmp_path / "small", "--bits", 4, "--group", 48], "choose one of 32, 64"),
        ([folder, tmp_path / "full", "--bits", 8], "choose a folder that does not exist yet"),
        ([folder, tmp_path / "small", "--bits", 8, "--keep", "*"], "leaves nothing to quantise"),
        ([tmp_path / "none", tmp_path / "small", "--bits", 8], "there is nothing at"),
    ):
        code, out, err = run(["quantise", *words], capsys)
        assert (code, out) == (2, ""), words
        assert message in err
    assert not (tmp_path / "small").exists()


def test_codes_are_not_quantised_again(folder, tmp_path, capsys):
    assert run(["quantise", folder, tmp_path / "small", "--bits", 8], capsys)[0] == 0
    code, _, err = run(["quantise", tmp_path / "small", tmp_path / "smaller", "--bits", 4], capsys)
    assert code == 2
    assert "quantised already" in err
