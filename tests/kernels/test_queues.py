"""Chunks shared out among threads: every chunk is done once, and results stay the same whoever does it."""

import threading
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection

import pytest
import torch
from kernels.test_bank import Case, compare
from torch import Tensor

from moestro.experts import make_experts
from moestro.kernels.plan import BATCHES, EXACT, REMEMBERED, TILES, WASTE, Chunk, make_plan, most_rows
from moestro.kernels.queues import run_chunks, shared_out
from moestro.kernels.rows import Scratch
from moestro.routing import SparseRouting


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def chunks_of(*rows: int, tile: int | None = None) -> list[Chunk]:
    bounds = [sum(rows[:i]) for i in range(len(rows) + 1)]
    return [Chunk(bounds[i], bounds[i + 1], [i], [rows[i]], tile) for i in range(len(rows))]


@pytest.mark.parametrize(
    ("rows", "together"),
    [((100,), [100]), ((10, 10), []), ((10, 10, 10), [10]), ((90, 5, 5), [90]), ((7, 6, 5, 4, 3, 2, 1), [])],
)
def test_what_one_thread_would_be_waited_for_is_done_by_all(rows: tuple[int, ...], together: list[int]) -> None:
    first, rest = shared_out(chunks_of(*rows), threads=2)
    assert [chunk.stop - chunk.start for chunk in first] == together
    left = [chunk.stop - chunk.start for chunk in rest]
    assert left == sorted(left, reverse=True)
    assert sorted(left + together) == sorted(rows)


def test_alone_nothing_is_shared_and_tiles_never_are() -> None:
    assert shared_out(chunks_of(90, 5), threads=1)[0] == []
    assert shared_out(chunks_of(96, 32, tile=32), threads=2)[0] == []


def test_every_chunk_is_done_once_without_gradients_and_on_one_thread(two_threads: None) -> None:
    done, seen = [], set()
    both = threading.Barrier(2, timeout=20)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        if len(seen) < 2:
            seen.add(threading.get_ident())
            both.wait()  # neither goes on before the other has begun
        done.append((chunk.start, torch.get_num_threads(), torch.is_grad_enabled()))
        assert scratch("x", chunk).shape == (chunk.stop - chunk.start, 3)

    chunks = chunks_of(*[4] * 20)
    run_chunks(chunks, work, torch.zeros(1), {"x": 3}, threads=2)
    assert sorted(done) == [(chunk.start, 1, False) for chunk in chunks]
    assert len(seen) == 2
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["main", "helper"])
def test_an_error_in_any_thread_is_raised(two_threads: None, where: str) -> None:
    both = threading.Barrier(2, timeout=20)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        both.wait()
        if (threading.current_thread() is threading.main_thread()) == (where == "main"):
            raise ArithmeticError(f"chunk {chunk.start}")

    with pytest.raises(ArithmeticError, match="chunk"):
        run_chunks(chunks_of(4, 4), work, torch.zeros(1), {}, threads=2)
    assert torch.get_num_threads() == 2


def test_threads_stay_for_the_next_call(two_threads: None) -> None:
    seen = set()
    both = threading.Barrier(2, timeout=20)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        both.wait()
        seen.add(threading.current_thread())

    run_chunks(chunks_of(4, 4), work, torch.zeros(1), {}, threads=2)
    assert len(seen) == 2
    assert all(thread.is_alive() for thread in seen)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_gets_threads_of_its_own(two_threads: None) -> None:
    def in_two_threads(done: Connection | None) -> None:
        rows, both = [], threading.Barrier(2, timeout=20)

        def work(chunk: Chunk, scratch: Scratch) -> None:
            both.wait()  # one alone breaks it
            rows.append(chunk.start)

        run_chunks(chunks_of(4, 4), work, torch.zeros(1), {}, threads=2)
        if done is not None:
            done.send(sorted(rows))

    in_two_threads(None)  # so that this process has some
    ours, theirs = Pipe()
    child = get_context("fork").Process(target=in_two_threads, args=(theirs,))
    child.start()
    try:
        assert ours.poll(30), "only the parent has the threads that the child waits for"
        assert ours.recv() == [0, 4]
    finally:
        child.kill()
        child.join()


def test_a_backward_gets_the_plan_of_its_forward() -> None:
    offsets = torch.tensor([0, 3, 3, 9])
    with torch.inference_mode():
        forward = make_plan(offsets, BATCHES)
    assert make_plan(offsets.clone(), BATCHES) is forward
    assert not forward.place.is_inference()
    assert make_plan(offsets, BATCHES, threads=2) is not forward
    assert make_plan(offsets, EXACT) is not forward
    assert make_plan(torch.tensor([0, 3, 4, 9]), BATCHES) is not forward
    large = torch.tensor([0, REMEMBERED, REMEMBERED + 1])
    assert make_plan(large, BATCHES) is not make_plan(large, BATCHES)


def a_case(**changes: object) -> Case:
    case = {
        "tokens": 257, "num_experts": 12, "k": 3, "ways": 9, "width": 40, "hidden": 56, "activation": "swiglu",
        "bias": True, "dtype": torch.float32, "contiguous": True, "kernel": "auto", "recompute": False,
        "drop": False, "seed": 1,
    }  # fmt: skip
    return Case(**(case | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["auto", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", [56, 2000])  # batched products, and one for each expert
def test_two_threads_equal_the_oracle(two_threads: None, hidden: int, dtype: torch.dtype, kernel: str) -> None:
    width = 40 if hidden < 100 else 72
    compare(a_case(width=width, hidden=hidden, dtype=dtype, kernel=kernel))
    compare(a_case(width=width, hidden=hidden, dtype=dtype, kernel=kernel, activation="silu", recompute=True))


@pytest.mark.parametrize("hidden", [56, 2000])
def test_an_expert_that_most_tokens_chose_equals_the_oracle(two_threads: None, hidden: int) -> None:
    compare(a_case(num_experts=2, ways=2, k=1, tokens=90, hidden=hidden, width=72))
    compare(a_case(num_experts=1, ways=1, k=1, hidden=hidden, width=72))


@pytest.mark.parametrize("kernel", ["fused", "tiled"])
@pytest.mark.parametrize("hidden", [56, 1500])
def test_two_threads_repeat_the_same_bits(two_threads: None, kernel: str, hidden: int) -> None:
    experts = make_experts(16, 96, hidden, kernel=kernel).bfloat16()
    x = torch.randn(300, 96).bfloat16().requires_grad_()
    routing = SparseRouting.from_choice(torch.rand(300, 16).topk(3).indices, torch.rand(300, 3), 16)

    def run() -> list[Tensor]:
        y = experts.run(x, routing)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_gradients_may_be_computed_with_other_threads_than_outputs() -> None:
    experts = make_experts(16, 24, 1500).double()
    x = torch.randn(300, 24, dtype=torch.float64).requires_grad_()
    routing = SparseRouting.from_choice(torch.rand(300, 16).topk(3).indices, torch.rand(300, 3).double(), 16)
    expected = torch.autograd.grad(experts.run(x, routing).square().sum(), [x, *experts.parameters()])
    y = experts.run(x, routing)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("counts", [[3, 0, 5], [40, 41, 0, 39, 300, 38], [1] * 70, [], [0, 0], list(range(1, 90))])
def test_a_batched_plan_holds_every_pair_and_wastes_little(counts: list[int]) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    plan = make_plan(offsets, BATCHES)
    assert plan.place is not None
    assert plan.source is not None
    assert plan.source[plan.place].tolist() == list(range(sum(counts)))
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    for chunk in plan.chunks:
        assert len(set(chunk.sizes)) == 1
        assert chunk.index is not None
        assert chunk.index.tolist() == chunk.experts
        rows = plan.source[chunk.start : chunk.stop]
        assert expert[rows].tolist() == [e for e in chunk.experts for _ in range(chunk.sizes[0])]
        used = sum(counts[e] for e in chunk.experts)
        assert len(chunk.experts) == 1 or chunk.stop - chunk.start <= (1 + WASTE) * used
    assert plan.rows <= most_rows(sum(counts), len(counts), BATCHES)


def test_where_rows_lie_does_not_depend_on_threads() -> None:
    offsets = torch.tensor([0, 500, 520, 900, 2000])
    for rounding in (BATCHES, EXACT, TILES):
        one, many = make_plan(offsets, rounding, 1), make_plan(offsets, rounding, 4)
        assert one.rows == many.rows
        if one.place is not None:
            assert many.place is not None
            assert torch.equal(one.place, many.place)
