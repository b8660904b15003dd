"""What the processes of a run exchange in a step, so that together they take the step of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.balance import RoutingLog, StepTotals
from moestro.experts.parallel import parallel_banks
from moestro.layers import Gradients
from moestro.parallel import Mesh
from moestro.parallel.gradients import dense_squares
from moestro.train.culprit import Culprit
from moestro.train.optimiser import gradient_norm
from moestro.train.team import Team


class Exchange(ABC):
    """What a step of one process needs of the others."""

    processes: int = 1
    """Processes with different tokens."""

    @abstractmethod
    def totals(self, log: RoutingLog) -> StepTotals | None:
        """Sums of the auxiliary losses of the micro-batch just recorded over all processes; None = of this one."""

    @abstractmethod
    def first_pass(self, log: RoutingLog, passes: Sequence[Callable[[], object]]) -> StepTotals:
        """Sums of the auxiliary losses of the whole step, see `RoutingLog.first_pass`."""

    @abstractmethod
    def gradients(self, model: nn.Module) -> None:
        """Make the gradient of every parameter that of all processes' tokens."""

    @abstractmethod
    def norm(self, model: nn.Module) -> Tensor:
        """The norm of the whole model's gradient."""

    @abstractmethod
    def dense_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of the gradient of some parameters, none of them of an expert."""

    @abstractmethod
    def summed(self, values: Tensor) -> Tensor:
        """Numbers, one from each process with tokens of its own, added up."""

    @abstractmethod
    def all_true(self, fact: bool) -> bool:
        """Whether something holds in every process."""

    @abstractmethod
    def earliest(self, culprit: Culprit | None) -> Culprit | None:
        """The culprit, of those that the processes found, that came first."""

    @abstractmethod
    def settle(self, model: nn.Module) -> None:
        """After the optimiser's step: what one process computed reaches those that need it."""


class NoExchange(Exchange):
    """One process alone."""

    def totals(self, log: RoutingLog) -> StepTotals | None:
        return None

    def first_pass(self, log: RoutingLog, passes: Sequence[Callable[[], object]]) -> StepTotals:
        return log.first_pass(passes)

    def gradients(self, model: nn.Module) -> None: ...

    def norm(self, model: nn.Module) -> Tensor:
        return gradient_norm(model.parameters())

    def dense_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def summed(self, values: Tensor) -> Tensor:
        return values

    def all_true(self, fact: bool) -> bool:
        return fact

    def earliest(self, culprit: Culprit | None) -> Culprit | None:
        return culprit

    def settle(self, model: nn.Module) -> None: ...


class Exchanging(Exchange):
    """One process among several, each with tokens of its own.

    Args:
        team: all processes.
        mesh: how they are arranged.
        model: after it was spread.
        keeper: by identity of a parameter the process that steps it, if that is shared out; else empty.
    """

    def __init__(self, team: Team, mesh: Mesh, model: nn.Module, keeper: Mapping[int, int]) -> None:
        self.team, self.mesh, self.keeper = team, mesh, keeper
        self.processes = mesh.shape.dense
        self._gradients = Gradients(model, mesh)
        self._of_experts = [p for _, bank in parallel_banks(model) for p in bank.parameters()]

    def totals(self, log: RoutingLog) -> StepTotals:
        totals = log.totals(self.mesh.dense)
        totals.parts *= self.processes
        return totals

    def first_pass(self, log: RoutingLog, passes: Sequence[Callable[[], object]]) -> StepTotals:
        totals = log.first_pass(passes, self.mesh.dense)
        totals.parts *= self.processes
        return totals

    def gradients(self, model: nn.Module) -> None:
        self._idle_experts()
        self._gradients.reduce(mean=False)

    def norm(self, model: nn.Module) -> Tensor:
        return self._gradients.norm().to(next(model.parameters()).dtype)

    @torch.no_grad()
    def dense_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return dense_squares(parameters, self.mesh.dense).sqrt()

    def summed(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=self.mesh.dense)
        return values

    def all_true(self, fact: bool) -> bool:
        return not self.team.highest(int(not fact))

    def earliest(self, culprit: Culprit | None) -> Culprit | None:
        said = self.team.gather(None if culprit is None else culprit.facts())
        found = [
            Culprit(facts[0], facts[1], facts[2], rank) for rank, facts in enumerate(said) if facts is not None
        ]
        if not found:
            return None
        first = min(found, key=lambda each: each.order)
        everywhere = len(found) == self.team.size and len({(each.kind, each.name) for each in found}) == 1
        return replace(first, rank=None) if everywhere else first

    def settle(self, model: nn.Module) -> None:
        if not self.keeper:
            return
        of_experts = {id(parameter) for parameter in self._of_experts}
        stepped: dict[tuple[bool, int], list[nn.Parameter]] = {}
        for parameter in (p for p in model.parameters() if id(p) in self.keeper):
            stepped.setdefault((id(parameter) in of_experts, self.keeper[id(parameter)]), []).append(parameter)
        for (of_expert, keeper), parameters in stepped.items():
            _broadcast(parameters, keeper, self.mesh.replicas if of_expert else self.mesh.dense)

    def _idle_experts(self) -> None:
        """Experts of this process that met no token, while others' did, have a gradient of zero, not None."""
        if not self._of_experts:
            return
        met = torch.tensor([p.grad is not None for p in self._of_experts], dtype=torch.uint8)
        dist.all_reduce(met, op=dist.ReduceOp.MAX)
        for parameter, any_met in zip(self._of_experts, met.tolist(), strict=True):
            if any_met and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def _broadcast(parameters: Sequence[nn.Parameter], source: int, group: dist.ProcessGroup) -> None:
    """Give all processes of a group the parameters of one, in a single message."""
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    dist.broadcast(flat, source, group=group)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
