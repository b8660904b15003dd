"""Token files to batches: batch n is a pure function of seed and n, so a run resumes anywhere at no cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from moestro.data.tokenfile import TokenFile

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Shapes: tokens and targets (the next tokens) int64, domain (of `tokens`) uint8, all `[batch, length]`.
    """

    tokens: Tensor
    targets: Tensor
    domain: Tensor
    num_bytes: int
    """Bytes of text that the targets represent: bits per byte = summed loss in nats / (num_bytes ln 2)."""


@dataclass(frozen=True)
class Share:
    """Which rows of every batch one of several processes takes.

    A batch is cut into micro-batches and each of these into one piece per process, so that the processes together
    read what one process alone would, micro-batch by micro-batch and in the same order.

    Attributes:
        index: of the process, counted from 0.
        count: of processes with different rows.
        accumulate: micro-batches of a batch.
    """

    index: int = 0
    count: int = 1
    accumulate: int = 1

    def of(self, rows: np.ndarray) -> np.ndarray:
        """This process's entries of a batch, `[batch, ...]`; pieces differ by one where they cannot be equal."""
        if self.count == 1:
            return rows
        return np.concatenate(
            [np.array_split(part, self.count)[self.index] for part in np.array_split(rows, self.accumulate)]
        )


class Batches:
    """Windows of `length + 1` tokens over packed documents, in batches.

    Window w covers tokens `w * length` to `(w + 1) * length`, so every token but the first is a target once
    an epoch. Shuffled, sample i of the run is window `permutation(epoch)[i mod windows]` of epoch i div
    windows: no window is repeated or missed within an epoch, a batch may straddle two epochs, and a last
    window that is too short is left out. In order (`shuffle=False`) the last batch is smaller, and a short
    last window comes as a batch of its own, so that every target appears once.

    Args:
        token_file: where the tokens are.
        batch_size: sequences in a batch.
        length: tokens in a sequence.
        seed: of the order.
        shuffle: a new order every epoch, or the order of the file.
        share: what this process takes of every batch; all of it if it is alone.

    Raises:
        ValueError: fewer tokens than one batch needs (in order: fewer than two tokens).
    """

    def __init__(
        self,
        token_file: TokenFile,
        batch_size: int,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        share: Share | None = None,
    ):
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size={batch_size} and length={length}; both must be at least 1")
        self.token_file, self.batch_size, self.length = token_file, batch_size, length
        self.seed, self.shuffle, self.share = seed, shuffle, share or Share()
        self.num_windows, self._rest = divmod(max(len(token_file) - 1, 0), length)
        needed = batch_size * length + 1 if shuffle else 2
        if len(token_file) < needed:
            raise ValueError(_too_small(token_file, needed, batch_size, length, shuffle))

    @property
    def batches_per_epoch(self) -> int:
        """Batches that cover the file once, rounded up."""
        whole = -(-self.num_windows // self.batch_size)
        return whole if self.shuffle else whole + (self._rest > 0)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the first epoch."""
        return (self.at(step) for step in range(self.batches_per_epoch))

    def at(self, step: int) -> Batch:
        """The batch of a step, 0 being the first."""
        if step < 0:
            raise ValueError(f"step={step}; steps count from 0")
        if self.shuffle:
            return self._gather(self._shuffled(step), self.length)
        first = step % self.batches_per_epoch * self.batch_size
        if first >= self.num_windows:
            return self._gather(np.array([self.num_windows]), self._rest)
        return self._gather(np.arange(first, min(first + self.batch_size, self.num_windows)), self.length)

    def _shuffled(self, step: int) -> np.ndarray:
        """The windows of a step, [batch]."""
        windows = []
        sample, end = step * self.batch_size, (step + 1) * self.batch_size
        while sample < end:
            epoch, position = divmod(sample, self.num_windows)
            count = min(end - sample, self.num_windows - position)
            inside = np.arange(position, position + count)
            windows.append(permute(inside, self.num_windows, f"{self.seed}/{epoch}"))
            sample += count
        return np.concatenate(windows)

    def _gather(self, windows: np.ndarray, length: int) -> Batch:
        import torch

        file, windows = self.token_file, self.share.of(windows)
        index = windows[:, None] * self.length + np.arange(length + 1)  # [batch, length + 1]
        tokens = file.tokens[index].astype(np.int64)
        domain = torch.from_numpy(file.domains[index[:, :-1]])
        num_bytes = int(file.piece_bytes[tokens[:, 1:]].sum(dtype=np.int64))
        rows = torch.from_numpy(tokens)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), domain, num_bytes)


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where the key's permutation of range(size) sends each index; needs no table of `size` entries.

    A Feistel network permutes the numbers of 2h bits, the fewest that hold `size`; a number that it sends out
    of range is sent on until it is back (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(xxhash.xxh3_64_intdigest(f"{key}/{turn}".encode())) for turn in range(_ROUNDS)]
    out = index.astype(np.uint64)
    moving = np.ones(len(out), dtype=bool)
    while moving.any():
        left, right = out[moving] >> half, out[moving] & mask
        for turn_key in keys:
            left, right = right, left ^ (_mix(right ^ turn_key) & mask)
        out[moving] = left << half | right
        moving = out >= size
    return out.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """Scatter 64 bits over 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _too_small(file: TokenFile, needed: int, batch_size: int, length: int, shuffle: bool) -> str:
    have = f"{file.path.stem} has {len(file)} tokens, but"
    if not shuffle:
        return f"{have} at least {needed} are needed; add text or change validation_fraction"
    one_batch = f"one batch of {batch_size} sequences of {length} needs {needed}"
    return f"{have} {one_batch}; lower batch_size or the sequence length, or add text"
