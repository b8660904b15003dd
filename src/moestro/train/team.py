"""The processes that train one model together: how they meet, agree, and share what went wrong."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.train.errors import DamagedCheckpoint, LostProcess, NonFiniteLoss

T = TypeVar("T")
_SHARED = (DamagedCheckpoint, NonFiniteLoss, ValueError, OSError, RuntimeError)  # the first that fits
SILENCE = re.compile(r"connection (closed|reset|refused)|timed out|broken pipe|remote process", re.IGNORECASE)


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together; alone unless `joined`.

    What one process says to all is JSON, never a pickle.

    Attributes:
        rank: of this process, counted from 0.
        size: processes.
        local_rank: of this process among those on the same computer.
        local_size: how many those are.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files that there are one of, and speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every process says, by rank. Plain JSON values only."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = int(max(lengths))
        said = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(said, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        return [json.loads(bytes(each[: int(n)].tolist())) for each, n in zip(said, lengths, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process; if it fails in one, all raise the error of the lowest rank that failed."""
        answer, error = None, None
        try:
            answer = work()
        except Exception as caught:
            error = caught
        if self.size == 1 and error is not None:
            raise error
        said = self.gather(None if error is None else _told(error))
        failed = next((rank for rank, each in enumerate(said) if each is not None), None)
        if failed is not None:
            raise _shared(failed, said[failed]) from error
        return answer  # type: ignore[return-value]

    def by_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process and tell all its answer, a JSON value; an error is raised by all."""
        if self.size == 1:
            return work()
        answers = self.gather(self.together(lambda: work() if self.first else None))
        answer: T = answers[0]
        return answer

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do something in the first process of every computer, then in the others, which find it done."""
        answer = self.together(lambda: work() if self.local_rank == 0 else None)
        return self.together(work if self.local_rank else lambda: answer)  # type: ignore[return-value]

    @contextmanager
    def held_by_first(self, make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """A context that the first process enters for all; its value must be a JSON value."""
        stack = ExitStack()
        yielded = self.by_first(lambda: stack.enter_context(make()))
        try:
            yield yielded
        except BaseException as error:
            stack.__exit__(type(error), error, error.__traceback__)
            raise
        self.by_first(stack.close)

    def summed(self, values: Tensor) -> Tensor:
        """Numbers added up over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def highest(self, number: int) -> int:
        """The highest of the numbers that the processes name."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)


ALONE = Team()


def _told(error: Exception) -> dict[str, Any]:
    kind = next((kind.__name__ for kind in _SHARED if isinstance(error, kind)), type(error).__name__)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    name = getattr(error, "filename", None)
    return {"kind": kind, "text": f"{name}: {text}" if name else text or type(error).__name__}


def _shared(rank: int, told: Mapping[str, str]) -> Exception:
    """An error of one process as all raise it; those of the first, which speaks for all, need no name."""
    kind = next((kind for kind in _SHARED if kind.__name__ == told["kind"]), RuntimeError)
    text = (
        told["text"]
        if kind is not RuntimeError or told["kind"] == "RuntimeError"
        else f"{told['kind']}: {told['text']}"
    )
    return kind(text if rank == 0 else f"rank {rank}: {text}")


def is_silence(error: BaseException) -> bool:
    """Whether an error only says that another process ended or does not answer."""
    if isinstance(error, LostProcess | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and bool(SILENCE.search(str(error)))


@contextmanager
def joined_from_environment(timeout: float) -> Iterator[Team]:
    """The team that torchrun started: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: the port is taken.
        LostProcess: not all processes arrive.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    with _joined("env://", rank, size, local, timeout) as team:
        yield team


@contextmanager
def joined_by_file(meeting_place: Path, rank: int, size: int, timeout: float) -> Iterator[Team]:
    """A team on one computer that meets in a file and talks over the loopback device only."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    with _joined(f"file://{meeting_place.absolute()}", rank, size, (rank, size), timeout) as team:
        yield team


def loopback() -> str:
    """The name of the loopback network device."""
    import socket

    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    return next((name for name in ("lo", "lo0") if name in names), "lo")


@contextmanager
def _joined(method: str, rank: int, size: int, local: tuple[int, int], timeout: float) -> Iterator[Team]:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _not_met(error, rank, size) from None
    try:
        yield Team(rank, size, *local)
    finally:
        dist.destroy_process_group()
        gc.collect()  # groups that a model's cycles hold, or their threads meet Python's end and abort it


def _not_met(error: Exception, rank: int, size: int) -> Exception:
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return ValueError(f"the port {where} is in use; pass torchrun another --master-port, or --standalone")
    return LostProcess(f"rank {rank} did not meet all of the {size} processes: {error}")
