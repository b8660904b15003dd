"""Whole runs: what they write, that they repeat bit for bit, that they stop and go on, that they refuse."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from oracles.tiny_run import TEXT, tiny_recipe

from moestro.models import load_model
from moestro.train import NonFiniteLoss, Stopped, dump_recipe, load_recipe, train_run
from moestro.train.build import build_corpus, training_batches
from moestro.train.files import read_lines
from moestro.train.progress import Silent
from moestro.train.seeds import seed_everything
from moestro.train.training import Training


def losses(run):
    keys = ("step", "loss", "auxiliary_loss", "grad_norm", "lr")
    return [[record[key] for key in keys] for record in read_lines(run / "metrics.jsonl")]


class StopAfter(Silent):
    """Presses ctrl-C during a step of one of the models."""

    def __init__(self, step, name="moe", number=signal.SIGINT):
        self.at, self.name, self.number, self.lines = step, name, number, []

    def say(self, line):
        self.lines.append(line)

    def begin(self, name, step, steps, log_every):
        self.now = name

    def step(self, record):
        if (self.now, record["step"]) == (self.name, self.at):
            os.kill(os.getpid(), self.number)


def test_a_run_leaves_a_complete_folder(tmp_path):
    recipe, out = tiny_recipe(tmp_path / "text.txt", twin=True), tmp_path / "runs" / "first"
    result = train_run(recipe, out, progress=Silent())
    shared = {"metrics.jsonl", "evaluations.jsonl", "events.jsonl", "result.json", "model"}
    assert set(os.listdir(out / "twin")) == shared
    assert set(os.listdir(out)) == shared | {
        "recipe.yaml",
        "tokenizer",
        "routing.jsonl",
        "specialisation.json",
        "report.html",
        "twin",
    }
    assert load_recipe(out / "recipe.yaml") == recipe
    assert [record["step"] for record in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in read_lines(out / "evaluations.jsonl")] == [2, 4, 6]
    assert [record["step"] for record in read_lines(out / "routing.jsonl")] == [2, 4, 6]
    assert json.loads((out / "result.json").read_text()) == result
    assert result["tokens"] == result["twin"]["tokens"] == 6 * 4 * 16
    assert result["active_parameters"] == pytest.approx(result["twin"]["active_parameters"], rel=0.01)
    assert result["total_parameters"] > result["active_parameters"]
    final = read_lines(out / "evaluations.jsonl")[-1]
    assert result["validation_bits_per_byte"] == final["bits_per_byte"]
    assert {"step", "loss", "lr", "tokens_per_second", "grad_norm", "auxiliary_loss", "balance"} == set(
        read_lines(out / "metrics.jsonl")[0]
    )
    assert load_model(out / "model").parameter_counts().total == result["total_parameters"]


def test_a_run_learns(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=60, learning_rate=1e-2, evaluate_every=60)
    result = train_run(recipe, tmp_path / "run", progress=Silent())
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    assert first == pytest.approx(5.55, abs=0.3)  # ln 256: it knows nothing yet
    assert result["validation_loss"] < first - 2


@pytest.mark.parametrize("method", ["mixtral", "deepseek-v3", "shazeer-noisy-topk", "switch"])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, method):
    options = {} if method in ("mixtral", "switch") else {"top_k": 2}
    recipe = tiny_recipe(tmp_path / "text.txt", method=method, options=options, twin=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train_run(recipe, whole, progress=Silent())
    with pytest.raises(Stopped, match=r"stopped after step 2 of 6 and saved; --resume continues") as caught:
        train_run(recipe, parts, progress=StopAfter(2))
    assert (caught.value.step, caught.value.exit_code) == (2, 130)
    assert not (parts / "result.json").exists()
    with pytest.raises(Stopped) as caught:
        train_run(recipe, parts, resume=True, progress=StopAfter(3, "dense twin", signal.SIGTERM))
    assert caught.value.exit_code == 143
    resumed = train_run(recipe, parts, resume=True, progress=Silent())
    for part in ("", "twin"):
        assert losses(parts / part) == losses(whole / part)
        assert read_lines(parts / part / "evaluations.jsonl") == read_lines(whole / part / "evaluations.jsonl")
        weights = [(run / part / "model" / "model.safetensors").read_bytes() for run in (parts, whole)]
        assert weights[0] == weights[1]
        assert not (parts / part / "checkpoint").exists()
    assert read_lines(parts / "routing.jsonl") == read_lines(whole / "routing.jsonl")
    assert resumed["validation_bits_per_byte"] == result["validation_bits_per_byte"]
    assert set(os.listdir(parts)) == set(os.listdir(whole))


def test_resuming_a_finished_run_answers_its_result(tmp_path):
    recipe, out = tiny_recipe(tmp_path / "text.txt"), tmp_path / "run"
    result = train_run(recipe, out, progress=Silent())
    assert train_run(recipe, out, resume=True, progress=Silent()) == result


def test_two_runs_are_equal_bit_for_bit_and_seeds_differ(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        noisy = {"method": "shazeer-noisy-topk", "options": {"top_k": 2}}
        recipe = tiny_recipe(tmp_path / "text.txt", seed=seed, precision="bfloat16", accumulate=2, **noisy)
        torch.manual_seed(hash(name))  # whatever the caller did before
        train_run(recipe, tmp_path / name, progress=Silent())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.nightly  # two threads on a busy machine wait for each other
def test_two_threads_repeat_bit_for_bit_too(tmp_path):
    for name in ("a", "b"):
        sizes = {"data": {"sequence_length": 128}, "batch_size": 8}
        recipe = tiny_recipe(tmp_path / "text.txt", steps=100, threads=2, evaluate_every=100, **sizes)
        train_run(recipe, tmp_path / name, progress=Silent())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.nightly  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_a_compiled_model_learns_the_same(tmp_path):
    for name, compiled in (("eager", False), ("compiled", True)):
        train_run(tiny_recipe(tmp_path / "text.txt", compile=compiled), tmp_path / name, progress=Silent())
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert [row[1] for row in compiled] == pytest.approx([row[1] for row in eager], rel=1e-4)
    assert (tmp_path / "compiled" / "routing.jsonl").stat().st_size > 0


def test_the_caller_finds_torch_as_it_was(tmp_path):
    before = torch.get_rng_state()
    train_run(tiny_recipe(tmp_path / "text.txt", threads=2), tmp_path / "run", progress=Silent())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_first_lines_state_what_decides_the_run(tmp_path):
    told = StopAfter(0)
    recipe = tiny_recipe(tmp_path / "text.txt", method="deepseek-v3", options={"top_k": 2, "bias_rate": 0.002})
    result = train_run(recipe, tmp_path / "run", progress=told)
    text = "\n".join(told.lines)
    assert told.lines[0].startswith("device cpu (")
    assert told.lines[0].endswith("float32 (as asked) · 1 threads")
    assert "train text: 1 documents" in text
    spaced = [f"{result[key]:,}".replace(",", " ") for key in ("total_parameters", "active_parameters")]
    assert f"parameters: {spaced[0]} total, {spaced[1]} active" in text
    assert "LossFreeBias(rate=0.002)" in text


def test_bits_per_byte_of_a_model_that_knows_nothing_is_eight(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", method=None, steps=1, learning_rate=1e-12)
    result = train_run(recipe, tmp_path / "run", progress=Silent())
    assert result["validation_bits_per_byte"] == pytest.approx(8, abs=0.4)
    assert result["name"] == "dense"
    assert "twin" not in result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "expert-choice"}, "not causal"),
        ({"method": "smear"}, "not causal"),
        ({"options": {"top_k": 5}}, "top_k"),
        ({"data": {"sequence_length": 4000}}, "one batch of 4 sequences of 4000 needs"),
        ({"data": {"paths": ["missing.txt"]}}, "missing.txt"),
        ({"device": "cuda:99"}, "CUDA devices; pass auto or cpu"),
        ({"device": "gpu"}, "pass auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path, change, message):
    recipe = tiny_recipe(tmp_path / "text.txt", **change)
    with pytest.raises(ValueError, match=message):
        train_run(recipe, tmp_path / "runs" / "run", progress=Silent())
    assert not (tmp_path / "runs").exists()


def test_empty_text_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="no text"):
        train_run(recipe, tmp_path / "run", progress=Silent())
    assert not (tmp_path / "run").exists()


@pytest.fixture
def broken_at(monkeypatch):
    """Breaks the weights of the model before a step."""

    def at(step):
        def one_step(training, *arguments):
            if training.learner.step + 1 == step:
                training.learner.model.embedding.weight.data.fill_(float("nan"))
            original(training, *arguments)

        original = Training._one_step
        monkeypatch.setattr(Training, "_one_step", one_step)

    return at


def test_a_failure_in_the_first_step_leaves_nothing(tmp_path, broken_at):
    broken_at(1)
    with pytest.raises(NonFiniteLoss, match=r"at step 1 \(first in weight of embedding\.weight\)"):
        train_run(tiny_recipe(tmp_path / "text.txt"), tmp_path / "runs" / "x", progress=Silent())
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_measured(tmp_path, broken_at):
    broken_at(3)
    with pytest.raises(NonFiniteLoss, match="at step 3"):
        train_run(tiny_recipe(tmp_path / "text.txt"), tmp_path / "run", progress=Silent())
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run" / "result.json").exists()


def test_changed_text_is_not_resumed(tmp_path):
    recipe, out = tiny_recipe(tmp_path / "text.txt"), tmp_path / "run"
    with pytest.raises(Stopped):
        train_run(recipe, out, progress=StopAfter(1))
    (tmp_path / "text.txt").write_text(TEXT + "More.")
    with pytest.raises(ValueError, match="the text has changed since this run was stopped"):
        train_run(recipe, out, resume=True, progress=Silent())
    assert read_lines(out / "metrics.jsonl")


def test_a_stop_during_an_evaluation_repeats_it(tmp_path):
    class StopInEvaluation(Silent):
        def begin(self, name, step, steps, log_every):
            self.steps = steps

        def step(self, record):
            if record["step"] == self.steps:
                os.kill(os.getpid(), signal.SIGINT)

    recipe = tiny_recipe(tmp_path / "text.txt")
    with pytest.raises(Stopped, match="after step 6 of 6"):
        train_run(recipe, tmp_path / "run", progress=StopInEvaluation())
    assert [record["step"] for record in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [2, 4]
    train_run(recipe, tmp_path / "run", resume=True, progress=Silent())
    assert [record["step"] for record in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [2, 4, 6]


def test_a_stop_after_an_evaluation_does_not_repeat_it(tmp_path):
    class StopAfterEvaluation(Silent):
        def evaluated(self, record):
            os.kill(os.getpid(), signal.SIGINT)

    recipe = tiny_recipe(tmp_path / "text.txt")
    with pytest.raises(Stopped, match="after step 2 of 6"):
        train_run(recipe, tmp_path / "run", progress=StopAfterEvaluation())
    train_run(recipe, tmp_path / "run", resume=True, progress=Silent())
    assert [record["step"] for record in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [2, 4, 6]


def test_the_seed_decides_the_order_of_the_data_and_every_generator(tmp_path):
    def order(seed):
        recipe = tiny_recipe(tmp_path / "text.txt", seed=seed)
        return training_batches(build_corpus(recipe.data), recipe).at(0).tokens

    def draws(seed):
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert draws(2**40) == draws(2**40)
    assert not set(draws(1)) & set(draws(2))


SCRIPT = """
import sys
from moestro.train import Stopped, load_recipe, train_run
try:
    train_run(load_recipe(sys.argv[1]), sys.argv[2], resume=sys.argv[3:] == ["--resume"])
except Stopped as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_ctrl_c_stops_a_process_cleanly_and_resume_repeats_the_uninterrupted_run(tmp_path):
    often = {"evaluate_every": 100, "log_every": 50}
    noisy = {"method": "shazeer-noisy-topk", "options": {"top_k": 2}}
    recipe = tiny_recipe(tmp_path / "text.txt", steps=300, **noisy, **often)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(tmp_path / "r.yaml", parts)
    while len(read_lines(parts / "metrics.jsonl")) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "and saved; --resume continues" in output
    done = len(read_lines(parts / "metrics.jsonl"))
    assert 20 <= done < 300
    process = start(tmp_path / "r.yaml", parts, "--resume")
    process.communicate(timeout=120)
    assert process.returncode == 0
    train_run(recipe, whole, progress=Silent())
    assert losses(parts) == losses(whole)
    assert len(losses(parts)) == 300
