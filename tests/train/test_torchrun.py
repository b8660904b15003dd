"""The same training under torchrun: its numbers, its result in one place, and the end of a rank."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from oracles.tiny_run import tiny_recipe

from moestro.train import dump_recipe, launch_run
from moestro.train.files import read_lines

MINE = {"method": "deepseek-v3", "options": {"top_k": 2}, "batch_size": 8}


def torchrun(tmp_path, processes, recipe, out):
    """torchrun on this computer, as one types it but for a port that is free."""
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = ["--nproc-per-node", processes, "--master-addr", "127.0.0.1", "--master-port", port]
    words = [*own, "-m", "moestro", "train", tmp_path / "r.yaml", "--out", out, "--quiet", "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_times(records):
    return [{key: value for key, value in each.items() if key != "tokens_per_second"} for each in records]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_torchrun_and_own_processes_are_the_same_to_the_bit(tmp_path, processes):
    recipe, out, own = tiny_recipe(tmp_path / "text.txt", **MINE), tmp_path / "theirs", tmp_path / "own"
    started = torchrun(tmp_path, processes, recipe, out)
    launch_run(recipe, own, processes, progress="silent")
    answer, said = started.communicate(timeout=120)
    assert started.returncode == 0, said
    assert answer.count('"validation_bits_per_byte"') == 1, "one rank prints"
    for name in ("metrics", "evaluations", "routing"):
        records = [without_times(read_lines(folder / f"{name}.jsonl")) for folder in (out, own)]
        assert records[0] == records[1] != []
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (own / "model" / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [2, 4])
def test_torchrun_names_the_rank_that_was_killed_and_ends_the_others(tmp_path, processes):
    recipe = tiny_recipe(tmp_path / "text.txt", steps=10**6, checkpoint_every=5, **MINE)
    started = torchrun(tmp_path, processes, recipe, tmp_path / "run")
    for _ in range(6000):
        if len(read_lines(tmp_path / "run" / "metrics.jsonl")) > 12:
            break
        time.sleep(0.02)
    ranks = {each.environ().get("RANK"): each for each in psutil.Process(started.pid).children()}
    killed = time.monotonic()
    ranks["1"].send_signal(signal.SIGKILL)
    _, said = started.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert started.returncode == 1
    assert f"Signal 9 (SIGKILL) received by PID {ranks['1'].pid}" in said
    assert " lost another process: " in said
    assert "torchrun says below which rank ended first" in said
    assert not any(each.is_running() for each in ranks.values())
    assert list((tmp_path / "run" / "checkpoint").glob("step-*"))


LEFT = """
import os, sys, types
from pathlib import Path
import torch.distributed as dist
from moestro.train.team import joined_by_file

with joined_by_file(Path(sys.argv[1]), 0, 1, 60.0):
    model = types.SimpleNamespace(group=dist.new_group([0]))
    model.own = model  # a cycle, as models have them
    dist.barrier(model.group)
    del model
print([Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists threads")
def test_no_thread_of_a_group_outlives_the_team(tmp_path):
    """One that drops its last tensor while Python ends would abort the process."""
    words = [sys.executable, "-W", "ignore", "-c", LEFT, str(tmp_path / "meet")]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "gloo" not in said
