"""Chunks of a bank shared out among threads, each computing whole products alone.

A product on two threads waits for the slower one, product after product; two threads that take one chunk after the
other from a queue wait once, at the end. On 2 cores products of 512 rows by 1024 by 512 in bfloat16 run at 0.97 of
twice the speed of one thread from two queues, and at 0.87 with two threads in each.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch
from torch import Tensor

from moestro.kernels.plan import Chunk
from moestro.kernels.rows import Scratch
from moestro.kernels.waiting import let_threads_sleep

Work = Callable[[Chunk, Scratch], None]

# More would wait for the interpreter's lock: they share out the threads instead. 64 experts in bfloat16, forward
# and backward, 16 threads on 2 cores, with at most 2, 4, 8 and 16 queues: 134, 103, 99 and 106 ms at 512 tokens,
# 487, 451, 445 and 437 ms at 4096. Not timed on a machine of more cores.
MOST_QUEUES = 8
UNEVEN = 1.1  # how much longer than the average queue the longest may be


def run_chunks(chunks: Sequence[Chunk], work: Work, like: Tensor, columns: Mapping[str, int], threads: int) -> None:
    """Do the work of every chunk; the result depends neither on the order nor on who does what.

    Args:
        chunks: in any order.
        work: what to do with a chunk, given memory of its own; it must write to the chunk's rows and experts only.
        like: says dtype and device of that memory.
        columns: of each block of that memory, by name.
        threads: as many as may compute at once.
    """
    together, apart = shared_out(chunks, threads)
    queues = min(threads, len(apart), MOST_QUEUES)
    longest = [_longest([*together, *apart]), *(_longest(apart) for _ in range(1, queues))]
    scratches = [Scratch(like, rows, columns) for rows in longest]
    for chunk in together:
        work(chunk, scratches[0])
    if apart:
        _run_apart(iter(apart), work, scratches, max(1, threads // queues))


def shared_out(chunks: Sequence[Chunk], threads: int) -> tuple[list[Chunk], list[Chunk]]:
    """Chunks that all threads do together, because one alone would be waited for, and the others, longest first.

    Chunks whose products have a fixed number of rows are all done apart: a row's bits must not depend on how many
    threads its product had.
    """
    apart = sorted(chunks, key=lambda chunk: chunk.start - chunk.stop)
    together: list[Chunk] = []
    while apart and apart[0].tile is None and threads > 1:
        rows = [chunk.stop - chunk.start for chunk in apart]
        if _longest_queue(rows, threads) * threads <= UNEVEN * sum(rows):
            break
        together.append(apart.pop(0))
    return together, apart


@cache
def _helpers(process: int) -> ThreadPoolExecutor:
    """Threads that stay, of this process: a new one would take 0.25 ms to start."""
    return ThreadPoolExecutor(MOST_QUEUES - 1, thread_name_prefix="moestro-queue")


def _longest_queue(rows: Sequence[int], threads: int) -> int:
    """Rows of the longest queue if each chunk goes to whoever is done first."""
    queues = [0] * threads
    for count in rows:
        heapq.heapreplace(queues, queues[0] + count)
    return max(queues)


def _longest(chunks: Sequence[Chunk]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def _run_apart(queue: Iterator[Chunk], work: Work, scratches: Sequence[Scratch], threads: int) -> None:
    """One thread per scratch, ours among them, takes chunks until there are none; the first error is raised."""
    errors: list[BaseException] = []
    inference = torch.is_inference_mode_enabled()

    def take(scratch: Scratch) -> None:
        torch.set_num_threads(threads)  # of this thread's products
        try:
            with torch.inference_mode(inference), torch.no_grad():  # the first alone would allow gradients
                for chunk in queue:
                    if errors:
                        return
                    work(chunk, scratch)
        except BaseException as error:
            errors.append(error)

    before = torch.get_num_threads()
    if len(scratches) > 1:
        let_threads_sleep()
    try:
        helping = [_helpers(os.getpid()).submit(take, scratch) for scratch in scratches[1:]]
        take(scratches[0])
        wait([each for each in helping if not each.cancel()])
    finally:
        torch.set_num_threads(before)  # last of all: it is also what threads yet to come begin with
    if errors:
        raise errors[0]
