"""What routers of transformers answer, read into one form and written back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """A router's answer, whatever the family.

    Attributes:
        logits: scores before the gate, `[tokens, experts]`.
        weight: combine weights, `[tokens, k]`.
        index: experts in the router's order, `[tokens, k]` int64.
        keep: choices that are carried out, `[tokens, k]` bool; None = all.
    """

    logits: Tensor
    weight: Tensor
    index: Tensor
    keep: Tensor | None = None


class RouterOutput(ABC):
    """One form of a router's output.

    Attributes:
        scale: whether the weight multiplies the expert's output or its input.
    """

    scale: Any = "output"

    @abstractmethod
    def read(self, router: nn.Module, output: Any) -> Reading:
        """The answer in our form. Shapes: see `Reading`."""

    @abstractmethod
    def write(self, output: Any, reading: Reading) -> Any:
        """An output of the family's form that says what `reading` says; `output` is the live one."""


class Triple(RouterOutput):
    """`(logits, weights, indices)`: nearly every family."""

    def read(self, router: nn.Module, output: Any) -> Reading:
        if not isinstance(output, tuple) or len(output) != 3:
            raise ValueError(f"{type(router).__name__} does not answer (logits, weights, indices); cannot watch it")
        logits, weight, index = output
        return Reading(logits, weight, index)

    def write(self, output: Any, reading: Reading) -> Any:
        return output[0], reading.weight, reading.index


class ScoresOnInput(RouterOutput):
    """`(scores, logits)` of Llama 4: scores `[tokens, experts]` are 0 where not chosen and scale the input."""

    scale = "input"

    def read(self, router: nn.Module, output: Any) -> Reading:
        scores, logits = output
        weight, index = scores.topk(router.top_k, dim=-1)
        return Reading(logits, weight, index)

    def write(self, output: Any, reading: Reading) -> Any:
        scores, logits = output
        return torch.zeros_like(scores).scatter(1, reading.index, reading.weight), logits


class OneHotOfSequences(RouterOutput):
    """`(one-hot, probability, logits)` of Switch, `[batch, length, ...]`; the one-hot is 0 where dropped."""

    def read(self, router: nn.Module, output: Any) -> Reading:
        chosen, probability, logits = (each.flatten(0, 1) for each in output)
        keep = chosen.any(-1, keepdim=True)
        index = torch.where(keep, chosen.argmax(-1, keepdim=True), logits.argmax(-1, keepdim=True))
        return Reading(logits, probability, index, keep)

    def write(self, output: Any, reading: Reading) -> Any:
        chosen, probability, logits = output
        one_hot = F.one_hot(reading.index[:, 0], chosen.shape[-1])
        one_hot = one_hot if reading.keep is None else one_hot * reading.keep
        return one_hot.view_as(chosen).to(chosen.dtype), reading.weight.view_as(probability), logits


class GateMatrix(RouterOutput):
    """`(first choice one-hot, gates, logits)` of NLLB; gates `[tokens, experts]` are 0 where dropped."""

    def read(self, router: nn.Module, output: Any) -> Reading:
        _, gates, logits = output
        rank = torch.where(gates > 0, 1 + gates.float(), logits.float().softmax(-1))
        index = rank.topk(2, dim=-1).indices
        weight = gates.gather(1, index)
        return Reading(logits, weight, index, weight > 0)

    def write(self, output: Any, reading: Reading) -> Any:
        first, gates, logits = output
        keep = torch.ones_like(reading.index, dtype=torch.bool) if reading.keep is None else reading.keep
        one_hot = F.one_hot(reading.index[:, 0], first.shape[-1]) * keep[:, :1]
        written = torch.zeros_like(gates).scatter_add(1, reading.index, reading.weight * keep)
        return one_hot.to(first.dtype), written, logits
