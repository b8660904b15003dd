"""MPipeMoE's strategies (`mpipemoe`): what a pipelined layer keeps between its passes, and sends for the rest.

That outputs and all gradients are those of one process, for every strategy, is tested in `test_exactness.py` too.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles.kept import HIDDEN, TOKENS, WIDTH
from oracles.ranks import run_ranks

from moestro.parallel.restore import Files, Pack, Restore, host, keep, strategies

ROWS, MIDDLE = TOKENS * WIDTH * 8, TOKENS * HIDDEN * 8  # of all parts together; relu keeps its results only
# MPipeMoE's names: the rows that came, what the experts keep, the rows to be sent again; all in memory
KEPT = {
    "none": ROWS + MIDDLE,
    "S1": 0,  # all on disk
    "S2": ROWS,  # the sender's own
    "S3": 0,
    "S4": ROWS,
    "kept rows": ROWS,
}
SCALARS = 4 * 8  # of the chains of exchanges


def test_a_layer_keeps_what_its_strategy_says_and_sends_again_what_it_must(tmp_path: Path) -> None:
    most: dict[str, list[int]] = {}
    numbers = (1, 2, 4)
    for rank in run_ranks("oracles.kept:measure", 2, {"folder": str(tmp_path), "chunks": numbers}, seconds=60):
        for chunks, answer in zip(numbers, rank, strict=True):
            assert answer.pop("litter") == []
            for name, got in answer.items():
                assert 0 <= got["kept"] - KEPT[name] <= SCALARS, f"{name} in {chunks} chunks"
                assert got["apart"] < 1e-12, name
                sent = got["sent"]
                again = sent["dispatch forward"] if name in ("S2", "S4") else 0
                assert (sent["dispatch recompute"], sent["combine recompute"]) == (again, 0), name
                assert (
                    sent["dispatch backward"] == sent["dispatch forward"] == sent["combine backward"] == ROWS // 2
                )
                most.setdefault(name, []).append(got["most"])
    for name, peaks in most.items():  # of each rank: more chunks, less at once
        assert peaks[:3] == sorted(peaks[:3], reverse=True), name
    # of what the experts keep, three of four quarters are not there at once, at the price of the sender's own rows
    assert most["none"][2] - most["S4"][2] >= MIDDLE * 3 // 4 - ROWS


def test_activation_checkpointing_runs_a_layer_in_parts_once_more_and_keeps_nothing_of_it() -> None:
    names = ["none", "S1", "S2", "S3", "S4"]
    for rank in run_ranks("oracles.kept:checkpointed", 2, names, seconds=60):
        for name, got in zip(names, rank, strict=True):
            computes, sends = name in ("S3", "S4"), name in ("S2", "S4")
            assert got["once"] == [4, 4 * computes], name
            assert got["calls"] == [4, 4 + 4 * computes], name
            sent = got["sent"]
            assert sent["recompute"] == (1 + sends) * sent["forward"], name
            assert sent["backward"] == sent["forward"], name
            assert got["apart"] == 0, name
            assert got["kept"] < ROWS // 4, name  # nothing of any size
            assert "lose what it kept" in got["copied"], name


def test_files_hold_tensors_without_names_and_say_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(3, 5, dtype=torch.float64)
    back = Files(tmp_path)(tensor)
    assert torch.equal(back(), tensor)
    assert not list(tmp_path.iterdir())
    assert Files(tmp_path)(tensor[:0])().shape == (0, 5)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Files(tmp_path)(tensor)
    assert not list(tmp_path.iterdir())


def test_the_host_takes_only_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"offload it with Files\(folder\)"):
        host(torch.ones(2))


def test_views_of_one_tensor_are_stored_once_and_a_changed_one_again() -> None:
    stored: list[torch.Tensor] = []

    def store(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        stored.append(tensor.clone())
        return keep(stored[-1])

    weight, rows, middle = torch.randn(2, 2), torch.randn(4, 2), torch.randn(4, 3)
    pack = Pack([weight], rows=keep, middle=store)
    pack.told(rows)
    whole, part = pack(middle), pack(middle[1:3, ::2])
    assert (len(stored), pack(weight)().data_ptr()) == (1, weight.data_ptr())
    assert torch.equal(pack(rows)(), rows)
    before = middle.clone()
    middle.add_(1)
    changed = pack(middle)
    assert len(stored) == 2
    assert torch.equal(whole(), before)
    assert torch.equal(part(), before[1:3, ::2])
    assert torch.equal(changed(), middle)


def test_rows_that_are_gone_are_not_taken_for_what_lies_in_their_place() -> None:
    stored: list[int] = []

    def store(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        stored.append(len(tensor))
        return keep(tensor.clone())

    pack = Pack([], rows=lambda tensor: torch.zeros_like(tensor).clone, middle=store)
    addresses, reused, backs = set[int](), 0, []
    for size in range(1, 60):
        rows = torch.ones(64)
        addresses.add(rows.data_ptr())
        pack.told(rows)
        del rows
        middle = torch.full((64,), float(size))
        reused += middle.data_ptr() in addresses
        backs.append(pack(middle))
        del middle
    assert reused
    assert [float(back()[0]) for back in backs] == list(range(1, 60))


def test_the_strategies_have_the_paper_s_names() -> None:
    found = strategies(host)
    assert found == {
        "none": Restore(keep, keep),
        "S1": Restore(host, host),
        "S2": Restore(None, host),
        "S3": Restore(host, None),
        "S4": Restore(None, None),
    }
