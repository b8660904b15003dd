"""Several processes train as one does, in the eyes of who starts them: losses, files, signals, deaths, sockets."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from oracles.tiny_run import tiny_recipe
from safetensors.torch import load_file
from torch.testing import assert_close

from moestro.cli import main
from moestro.train import LostProcess, Stopped, dump_recipe, launch_run, train_run
from moestro.train.files import read_lines
from moestro.train.lock import writing
from moestro.train.progress import Silent

STEPS = 500  # some seconds: enough to meet it on the way, on a busy machine too
MINE = {"method": "deepseek-v3", "options": {"top_k": 2}, "batch_size": 8}


def waited_for(condition, seconds=60.0):
    for _ in range(int(seconds / 0.02)):  # not by the clock: a paused machine does not wait
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def ranks():
    """The processes that train, by rank."""
    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # a child of another kind may have ended meanwhile
            words = child.cmdline()
            if "moestro.train.worker" in words:
                found[int(words[-1])] = child
    return found


class Act(threading.Thread):
    """Does something to a run once it has taken a few steps."""

    def __init__(self, out, act, steps=22):
        super().__init__(daemon=True)
        self.out, self.act, self.steps, self.at = out, act, steps, 0.0
        self.ranks = {}
        self.start()

    def run(self):
        waited_for(lambda: len(read_lines(self.out / "metrics.jsonl")) > self.steps)
        self.ranks = ranks()
        self.at = time.monotonic()
        self.act(self.ranks)


def listeners(processes):
    """Addresses on which they wait for others."""
    each = [connection for process in processes.values() for connection in process.net_connections("inet")]
    return {connection.laddr.ip for connection in each if connection.status == psutil.CONN_LISTEN}


def test_a_killed_rank_ends_the_others_and_a_run_goes_on_with_fewer_or_more(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=STEPS, checkpoint_every=20, evaluate_every=100, **MINE)
    whole = train_run(recipe, tmp_path / "one", progress=Silent())

    out, heard = tmp_path / "run", {}

    def look_and_kill(ranks):
        heard["on"] = listeners(ranks)
        try:
            with writing(out):
                heard["writer"] = "nobody"
        except ValueError as error:
            heard["writer"] = str(error)
        ranks[1].kill()

    act = Act(out, look_and_kill)
    with pytest.raises(LostProcess, match=r"rank 1 \(process \d+\) was ended by SIGKILL.* --resume goes on from"):
        launch_run(recipe, out, 2, progress="silent")
    act.join()
    assert time.monotonic() - act.at < 30
    assert heard["on"] == {"127.0.0.1"}
    assert heard["writer"].startswith(f"{out} is being written by process {act.ranks[0].pid};")
    assert not any(process.is_running() for process in act.ranks.values())
    assert list((out / "checkpoint").glob("step-*"))

    lines = len(read_lines(out / "metrics.jsonl"))
    Act(out, lambda ranks: os.kill(os.getpid(), signal.SIGTERM), lines + 3)
    with pytest.raises(Stopped, match=rf"stopped after step \d+ of {STEPS} and saved") as stopped:
        launch_run(recipe, out, 2, resume=True, progress="silent")
    assert stopped.value.exit_code == 143
    assert not ranks()
    result = train_run(recipe, out, resume=True, progress=Silent())
    same_run(tmp_path / "one", out)
    assert result["steps"] == whole["steps"] == STEPS


def same_run(one, other):
    for name in ("metrics", "evaluations"):
        first, second = read_lines(one / f"{name}.jsonl"), read_lines(other / f"{name}.jsonl")
        assert [record["step"] for record in first] == [record["step"] for record in second]
        for key in first[0].keys() - {"tokens_per_second"}:
            assert_close([r[key] for r in second], [r[key] for r in first], rtol=1e-4, atol=1e-5, msg=key)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)
    files = [sorted(path.name for path in (folder / "model").iterdir()) for folder in (one, other)]
    assert files[0] == files[1]
    for name in ("config.json", "tokenizer.json"):
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes()


def test_processes_end_when_their_starter_is_killed(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=10**6, **MINE)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    starter = run_of(["train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--processes", 2, "--quiet"])
    waited_for(lambda: len(read_lines(tmp_path / "run" / "metrics.jsonl")) > 2)
    started = psutil.Process(starter.pid).children()
    assert len(started) == 2
    starter.kill()
    starter.communicate()
    waited_for(lambda: not any(each.is_running() for each in started), 30)


@pytest.mark.nightly
def test_a_rank_that_falls_silent_ends_the_run(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=10**6, **MINE)
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"timeout": 5.0})})
    act = Act(tmp_path / "run", lambda ranks: ranks[1].suspend())
    with pytest.raises(LostProcess, match=r"rank 0 lost another process: timed out$"):
        launch_run(recipe, tmp_path / "run", 2, progress="silent")
    assert time.monotonic() - act.at < 30
    assert not any(process.is_running() for process in act.ranks.values())


def run_of(words, environment=None, **more):
    """`python -m moestro ...` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "moestro", *map(str, words)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def as_ranks(tmp_path, recipes, port):
    """One process per recipe, as torchrun would start them; what each said and its exit code."""
    started = []
    for rank, recipe in enumerate(recipes):
        path = tmp_path / f"r{rank}.yaml"
        path.write_text(dump_recipe(recipe))
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": len(recipes),
            "LOCAL_WORLD_SIZE": len(recipes),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        words = ["train", path, "--out", tmp_path / "run", "--quiet"]
        started.append(run_of(words, {name: str(value) for name, value in environment.items()}))
    return [(*process.communicate(timeout=120), process.returncode) for process in started]


def test_a_rank_with_another_recipe_is_named_before_anything_is_written(tmp_path):
    recipes = [tiny_recipe(tmp_path / "text.txt", steps=2, learning_rate=rate, **MINE) for rate in (1e-3, 2e-3)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _, error, code in as_ranks(tmp_path, recipes, port):
        assert code == 2
        assert "error: rank 1 differs from rank 0: train.learning_rate (0.001 there, 0.002 now)" in error
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_said_in_a_sentence(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=2, **MINE)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        ((_, error, code),) = as_ranks(tmp_path, [recipe], port)
    assert code == 2
    assert f"error: the port 127.0.0.1:{port} is in use" in error


def test_bad_words_are_refused_by_the_command(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    (tmp_path / "r.yaml").write_text(dump_recipe(tiny_recipe(text, steps=2, **MINE)))
    assert main(["train", str(tmp_path / "r.yaml"), "--processes", "0"]) == 2
    assert "processes=0; pass at least 1" in capsys.readouterr().err
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["train", str(tmp_path / "r.yaml"), "--processes", "2"]) == 2
    assert "torchrun has started the processes already; leave --processes out" in capsys.readouterr().err
