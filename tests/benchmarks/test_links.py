"""The model of slow links says what one works out by hand; namespaces end with the process that made them."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATE = 100.0


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("links_model")


def exchange(model: ModuleType, rank: int, ranks: int, size: int) -> object:
    """Every rank sends every other as much."""
    sizes = tuple(size * (peer != rank) for peer in range(ranks))
    return model.Start(tuple(range(ranks)), sizes, sizes)


def test_both_directions_of_a_link_carry_rows_at_once_also_for_a_late_rank(model: ModuleType) -> None:
    programs = [
        [model.Compute(late), exchange(model, rank, 2, 300), model.Wait(0)] for rank, late in enumerate((0, 1))
    ]
    assert model.Replay(programs, per_node=1, rate=RATE).seconds() == pytest.approx(1 + 3)


def test_ranks_share_what_leaves_their_node_and_nothing_inside(model: ModuleType) -> None:
    programs = [[exchange(model, rank, 4, 100), model.Wait(0)] for rank in range(4)]
    assert model.Replay(programs, per_node=2, rate=RATE).seconds() == pytest.approx(2 * 2 * 100 / RATE)
    assert model.Replay(programs, per_node=4, rate=RATE).seconds() == 0


def test_a_sender_deals_with_one_message_after_another_while_its_rank_computes(model: ModuleType) -> None:
    programs = [[exchange(model, rank, 3, 1), model.Compute(0.5), model.Wait(0)] for rank in range(3)]
    assert model.Replay(programs, per_node=1, rate=1e9, latency=0.3).seconds() == pytest.approx(2 * 0.3)
    assert model.Replay(programs, per_node=1, rate=1e9, latency=0.2).seconds() == pytest.approx(0.5)


def test_a_request_waits_behind_the_rows_before_it(model: ModuleType) -> None:
    """Rank 0 asks for rank 1's rows after it has begun to send its own: they can only come then."""
    group = (0, 1)
    first = [
        model.Compute(1),
        model.Start(group, (0, 300), (0, 0)),
        model.Start(group, (0, 0), (0, 200)),
        model.Wait(0),
        model.Wait(1),
    ]
    second = [
        model.Start(group, (0, 0), (300, 0)),
        model.Start(group, (200, 0), (0, 0)),
        model.Wait(0),
        model.Wait(1),
    ]
    assert model.Replay([first, second], per_node=1, rate=RATE).seconds() == pytest.approx(1 + 3 + 2)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("compute", [0.0, 1.0, 6.0, 20.0])
def test_chunks_take_what_the_recurrence_of_one_link_and_one_engine_says(
    model: ModuleType, chunks: int, compute: float
) -> None:
    """Order on the link: S1 S2 R1 S3 R2 ...; each job begins when the one before it and what it needs are done."""
    piece, each = 600 // chunks, compute / chunks
    programs = []
    for rank in range(2):
        start = exchange(model, rank, 2, piece)
        program, begun = [start], 1
        sends, results = [0], []
        for part in range(chunks):
            if part + 1 < chunks:
                program, sends, begun = [*program, start], [*sends, begun], begun + 1
            program += [model.Wait(sends[part]), model.Compute(each), start]
            results, begun = [*results, begun], begun + 1
        programs.append([*program, *map(model.Wait, results)])
    link, engine, ends = 0.0, 0.0, []
    order = ["S", *["S", "R"] * (chunks - 1), "R"]
    returned = 0
    for job in order:
        if job == "S":
            link += piece / RATE
            engine = max(link, engine) + each
            ends.append(engine)
        else:
            link = max(link, ends[returned]) + piece / RATE
            returned += 1
    assert model.Replay(programs, per_node=1, rate=RATE).seconds() == pytest.approx(link)


def test_programs_that_wait_for_ever_are_told(model: ModuleType) -> None:
    programs = [[exchange(model, 0, 2, 5), model.Wait(0)], [model.Compute(1.0)]]
    with pytest.raises(ValueError, match="wait for each other for ever"):
        model.Replay(programs, per_node=1, rate=RATE).seconds()


def test_a_machine_that_refuses_is_one_line(tmp_path: Path) -> None:
    script = "import links_nodes as n\ntry:\n with n.nodes(2, 40): pass\nexcept n.Refused as reason: print(reason)"
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCHMARKS, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert said.stdout == "unshare is not installed\n"


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_namespaces_end_with_the_process_that_made_them() -> None:
    script = (
        "import links_nodes as n, time\ntry:\n with n.nodes(2, 40) as p: print(*p, flush=True); time.sleep(60)\n"
        "except n.Refused: print('refused', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        words = maker.stdout.readline().split()
        if words == ["refused"]:
            pytest.skip("this machine allows no namespaces")
        assert all(Path(f"/proc/{pid}/ns/net").exists() for pid in words)
        os.kill(maker.pid, signal.SIGKILL)
    late = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in words) and time.monotonic() < late:
        time.sleep(0.05)
    assert not [pid for pid in words if Path(f"/proc/{pid}").exists()]
