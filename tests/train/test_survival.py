"""Runs that are killed at random come back and end as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import time

import pytest
import torch
from oracles.faulty_disk import FULL, Counter, fail, in_a_child, intercepted
from oracles.tiny_run import tiny_recipe
from safetensors.torch import load_file

import moestro.train.checkpoint_files
from moestro.cli import main
from moestro.train import dump_recipe, train_run
from moestro.train.progress import Silent


class Said(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def recipe_of(tmp_path, **train):
    settings = {"steps": 40, "evaluate_every": 15, "checkpoint_every": 5, **train}
    return tiny_recipe(tmp_path / "text.txt", method="deepseek-v3", options={"top_k": 2}, **settings)


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def same_ending(first, second):
    assert losses(first) == losses(second)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = [json.loads((out / "result.json").read_text()) for out in (first, second)]
    assert results[0]["validation_bits_per_byte"] == results[1]["validation_bits_per_byte"]
    assert (first / "evaluations.jsonl").read_text() == (second / "evaluations.jsonl").read_text()


def life(recipe, out, seconds):
    """Train in a process of its own that is killed after a while; the signal that ended it, 0 if it finished."""
    pid = os.fork()
    if pid == 0:
        try:
            train_run(recipe, out, resume="auto", progress=Silent())
        except BaseException:
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return 0
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return signal.SIGKILL


def killed_after(step, recipe, out):
    """Train in a process of its own that dies right after a step; the signal that ended it."""

    class Watcher(Silent):
        def step(self, record):
            if record["step"] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return in_a_child(lambda: train_run(recipe, out, resume="auto", progress=Watcher()))


@pytest.mark.parametrize("kills", [15, pytest.param(300, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
def test_random_kills_change_nothing(tmp_path, kills):
    recipe, chance = recipe_of(tmp_path), random.Random(kills)
    started = time.monotonic()
    train_run(recipe, tmp_path / "whole", progress=Silent())
    whole = time.monotonic() - started
    done = finished = 0
    while done < kills or not finished:
        out = tmp_path / f"killed{finished}"
        ended = life(recipe, out, chance.uniform(0, whole) if done < kills else 600)
        done += ended == signal.SIGKILL
        if ended == 0:
            finished += 1
            same_ending(tmp_path / "whole", out)
            assert not list(out.rglob("*.tmp"))
            assert not (out / ".lock").exists()
    assert done == kills


def test_at_most_the_steps_since_the_last_checkpoint_are_lost_and_goodput_says_how_many(tmp_path):
    recipe, out, said = recipe_of(tmp_path, steps=12), tmp_path / "run", Said()

    assert killed_after(8, recipe, out) == signal.SIGKILL
    result = train_run(recipe, out, resume=True, progress=said)
    assert "moe: resumed after step 5" in said.lines
    assert "moe: steps 6 to 8 are done again, they were not saved" in said.lines
    assert any(line.endswith("died without giving it back") for line in said.lines)
    goodput = result["goodput"]
    assert goodput["lost"] > 0
    assert goodput["productive"] > 0
    parts = [goodput[part] for part in ("productive", "data", "evaluation", "checkpoint", "lost", "other")]
    share = goodput["productive"] / sum(parts)  # of parts rounded to milliseconds
    assert goodput["share"] == pytest.approx(share, abs=0.02)


def test_a_disk_that_fills_up_does_not_end_the_run(tmp_path):
    recipe, said = recipe_of(tmp_path, steps=12), Said()
    fsync = Counter(2, fail(FULL))
    real = moestro.train.checkpoint_files.write_checkpoint

    def on_a_full_disk(target, checkpoint, team):
        with intercepted(fsync, ("fsync",)):
            real(target, checkpoint, team)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moestro.train.checkpoints.write_checkpoint", on_a_full_disk)
        train_run(recipe, tmp_path / "run", progress=said)
    assert "step 5 could not be saved: [Errno 28] No space left on device; the run goes on without it" in said.lines
    train_run(recipe, tmp_path / "other", progress=Silent())
    same_ending(tmp_path / "run", tmp_path / "other")


def test_resume_auto_starts_and_resumes_and_damaged_checkpoints_are_passed_over(tmp_path):
    recipe, out, said = recipe_of(tmp_path, steps=12), tmp_path / "run", Said()

    assert killed_after(11, recipe, out) == signal.SIGKILL
    newest = out / "checkpoint" / "step-00000010"
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (newest / "model.safetensors").write_bytes(data)
    train_run(recipe, out, resume="auto", progress=said)
    assert any("is damaged: the tensor model." in line and "falling back" in line for line in said.lines)
    assert "moe: resumed after step 5" in said.lines
    train_run(recipe, tmp_path / "whole", progress=Silent())
    same_ending(tmp_path / "whole", out)


def test_the_command_lists_and_verifies_checkpoints(tmp_path, capsys):
    recipe, out = recipe_of(tmp_path, steps=12), tmp_path / "run"

    assert killed_after(11, recipe, out) == signal.SIGKILL
    assert main(["checkpoints", str(out)]) == 0
    header, first, second = capsys.readouterr().out.strip().splitlines()
    assert header.split() == ["model", "step", "MiB", "kept", "as", "path"]
    assert first.split()[:2] + second.split()[:2] == ["moe", "5", "moe", "10"]
    assert main(["checkpoints", str(out), "--verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["whole", "whole"]
    assert all(row["gib_per_second"] > 0 for row in rows)
    (out / "checkpoint" / "step-00000005" / "state.json").unlink()
    assert main(["checkpoints", str(out), "--verify"]) == 1
    assert "state.json is missing" in capsys.readouterr().out
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_run_that_another_process_writes_is_left_alone(tmp_path, capsys):
    recipe, out = recipe_of(tmp_path, steps=12), tmp_path / "run"
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))

    class Watcher(Silent):
        def step(self, record):
            if record["step"] == 3:
                before = sorted(path.name for path in out.iterdir())
                for how in ("--overwrite", "--resume"):
                    assert main(["train", str(file), "--out", str(out), how, "--quiet"]) == 2
                    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
                assert sorted(path.name for path in out.iterdir()) == before

    train_run(recipe, out, progress=Watcher())
    assert (out / "result.json").is_file()
