"""`moestro train`, and what one does with a run: generate, eval, report, resume."""

import json
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.cli.generate import decode_stream
from moestro.cli.train import experts_in_words
from moestro.data import ByteTokenizer

SMALL = (
    "--steps 4 --model.width 16 --model.num-layers 1 --model.num-heads 2 --model.num-experts 4 "
    "--model.expert-hidden 16 --data.sequence-length 16 --train.batch-size 2 --train.threads 1"
)
TEXT = "a quick brown fox jumps over a lazy dog. " * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run, made by the command in its own folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "fox.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("MOESTRO_CACHE", str(home / "cache"))
        assert main(["train", "--data.paths", "fox.txt", *SMALL.split(), "--seed", "5", "--quiet"]) == 0
    return home / "runs" / "first-seed5"


@pytest.fixture
def home(run, monkeypatch) -> Path:
    folder = run.parents[1]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOESTRO_CACHE", str(folder / "cache"))
    return folder


def test_a_run_lies_in_the_folder_named_by_recipe_and_seed(run):
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "result.json", "model", "twin", "report.html"} <= names


def test_the_last_lines_say_how_the_experts_fared():
    result = {
        "dead_experts": 0,
        "smallest_share": 0.0789,
        "domains": ["code", "prose"],
        "told_apart": [0.58, 0.6154],
        "normalised_mutual_information": [0.0051, 0.004],
    }
    _, experts, domains = experts_in_words(result)
    assert experts == "experts: 0 dead; the least used serves 7.9 % of its layer's tokens"
    assert "code and prose: one choice of the best layer tells them apart 61.5 % of the time" in domains
    assert "(blindly 50.0 %); normalised mutual information 0.0051" in domains
    assert len(experts_in_words({**result, "domains": ["text"]})) == 2
    assert experts_in_words({"validation_bits_per_byte": 2.0}) == []


def test_the_table_compares_the_model_with_its_twin(run, home, capsys):
    assert main(["train", "--out", str(run), "--resume", "--quiet"]) == 0  # a finished run, with its own recipe
    header, moe, twin, *_, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads((run / "result.json").read_text())
    for name in ("validation bits per byte", "tokens/s", "active parameters", "total parameters", "seconds"):
        assert name in header
    assert f"{result['validation_bits_per_byte']:.4g}" in moe
    assert f"{result['twin']['validation_bits_per_byte']:.4g}" in twin
    assert last == f"report: {run / 'report.html'}"


def test_json_on_stdout_and_progress_on_stderr(home, capsys):
    words = [
        "train",
        "--data.paths",
        "fox.txt",
        *SMALL.split(),
        "--no-twin",
        "--method",
        "switch",
        "--json",
        "--out",
        "switch",
    ]
    assert main(words) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["method"], result["steps"], result["folder"]) == ("switch", 4, "switch")
    assert "twin" not in result
    assert "bits per byte" in captured.err


def test_another_run_is_not_overwritten(run, home, capsys):
    before = (run / "result.json").read_bytes()
    assert main(["train", "--data.paths", "fox.txt", *SMALL.split(), "--out", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--resume" in err
    assert "--overwrite" in err
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize("folder", [".", "model"])
def test_generate_takes_a_run_or_a_model_folder(folder, run, capsys):
    assert main(["generate", str(run / folder), "a quick", "--max-new-tokens", "8"]) == 0
    text, said = capsys.readouterr()
    assert text.startswith("a quick")
    assert text.endswith("\n")
    assert said.startswith("decoding by ")


def test_generate_takes_the_steps_that_one_asks_for(run, capsys):
    texts = set()
    for steps in ("torch", "auto"):
        assert main(["generate", str(run), "a quick", "--max-new-tokens", "8", "--steps", steps]) == 0
        text, said = capsys.readouterr()
        texts.add(text)
        assert steps != "torch" or said == "decoding by torch's operators\n"
    assert len(texts) == 1
    assert main(["generate", str(run), "a quick", "--steps", "fast"]) == 2


def test_generate_draws_by_seed(run, capsys):
    def draw(seed: int) -> str:
        words = ["generate", str(run), "a", "--temperature", "1.5", "--seed", str(seed), "--max-new-tokens", "24"]
        assert main(words) == 0
        return capsys.readouterr().out

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_eval_measures_bits_per_byte(run, home, capsys):
    words = ["eval", str(run), "--data", "fox.txt", "--json", "--device", "cpu"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_bytes"] == len(TEXT) - 1  # all but the first byte is predicted
    assert facts["sequence_length"] == 16  # as it was trained
    result = json.loads((run / "result.json").read_text())
    assert facts["bits_per_byte"] == pytest.approx(result["validation_bits_per_byte"], rel=0.1)


def test_report_is_written_again(run, capsys):
    page = run / "report.html"
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.stat().st_size > 0


def test_characters_stream_when_their_last_byte_is_there():
    tokenizer = ByteTokenizer()
    assert list(decode_stream(tokenizer, tokenizer.encode("aé"))) == ["a", "", "é", ""]
    assert list(decode_stream(tokenizer, [0xC3])) == ["", "\ufffd"]
