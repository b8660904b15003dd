"""Moves experts while a model trains, when the loads that are foreseen make it worth it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.balance.controllers import Controller
from moestro.experts.migration import Migration, check_movable, migrate
from moestro.experts.parallel import ParallelExperts, parallel_banks
from moestro.layers import MoE
from moestro.parallel import POLICIES, PREDICTORS, Cluster, LayerCost, Mesh, Placement
from moestro.parallel.policies import OF_THE_PAST, REPLICATING
from moestro.parallel.predict import LEAST_STEPS


class LoadMemory(Controller):
    """Remembers how often the experts of a layer were chosen in each of the last steps, and moves nothing.

    Args:
        most: steps that are remembered.
        group: ranks whose choices count too.

    Attributes:
        loads: of each step, `[experts]`.
    """

    def __init__(self, most: int, group: dist.ProcessGroup | None = None) -> None:
        self.loads, self.group = deque[np.ndarray](maxlen=most), group

    def update(self, moe: MoE, measured: Tensor) -> None:
        """Remember a step."""
        self.loads.append(self.summed(measured).cpu().numpy())

    def __repr__(self) -> str:
        return f"LoadMemory(most={self.loads.maxlen})"


@dataclass(frozen=True)
class Replaced:
    """What became of a layer's experts.

    Attributes:
        placement: where they are now.
        moved: slots of all ranks whose expert came from another rank.
        copied: slots whose expert was on the rank already.
        bytes_sent: by all ranks together.
        before: largest over mean load of a rank that was foreseen without the move; 1 = even.
        after: the same with it.
    """

    placement: Placement
    moved: int
    copied: int
    bytes_sent: int
    before: float
    after: float


class Rebalancer:
    """Re-places the experts of a spread model every so many steps, with their optimiser's state.

        rebalancer = Rebalancer(model, mesh, every=100)
        for batch in batches:
            with log.recording():
                ...
            optimiser.step()
            log.update_controllers()              # also tells the rebalancer what the step's load was
            rebalancer.step(optimiser)            # after every optimiser step

    Loads are summed over all ranks, the first rank decides and tells the others. A layer is left alone unless the
    busiest rank would have `gain` times as much to do without the move: the trigger of SmartMoE (Zhai et al. 2023),
    there 1.

    Args:
        model: after `moestro.layers.spread.spread`.
        mesh: its ranks.
        every: optimiser steps between decisions.
        policy: name in `moestro.parallel.POLICIES`.
        predictor: name in `moestro.parallel.PREDICTORS`, of the next `every` steps.
        gain: least gain for which a layer's experts move.
        history: steps that are remembered.
        groups: of experts, for node-limited routing.
        speeds: of the machine, where they are not those of `LayerCost`: `flops`, `inside` and `between`; only
            policies in `moestro.parallel.policies.WEIGHING` look at them.

    Raises:
        ValueError: unknown names, numbers out of range, a policy that cannot fill the slots, or a model without
            spread experts.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        every: int = 100,
        policy: str = "refined",
        predictor: str = "sliding-average",
        gain: float = 1.1,
        history: int = 1000,
        groups: int = 1,
        speeds: Mapping[str, float] | None = None,
    ) -> None:
        for name, word, known in (("policy", policy, POLICIES), ("predictor", predictor, PREDICTORS)):
            if word not in known:
                raise ValueError(f"unknown {name} {word!r}; there are {', '.join(known)}")
        if every < 1 or history < 1 or gain < 1:
            raise ValueError(f"every={every}, history={history} and gain={gain} must be at least 1")
        least = LEAST_STEPS.get(predictor, 1)
        if min(every, history) < least:
            raise ValueError(f"{predictor} needs {least} steps; pass every and history of at least as many")
        self._layers = _spread_layers(model)
        if not self._layers:
            raise ValueError("no layer of this model has its experts spread over ranks; call spread(...) first")
        self.mesh, self.every, self.gain, self.groups = mesh, every, gain, groups
        self.policy, self.predictor, self.speeds = policy, PREDICTORS[predictor], dict(speeds or {})
        self._memories = {name: LoadMemory(history, mesh.dense) for name in self._layers}
        for name, (moe, bank) in self._layers.items():
            moe.controllers = [*moe.controllers, self._memories[name]]
            self._check(policy, bank)
        self.steps = 0

    @torch.no_grad()
    def step(self, optimiser: torch.optim.Optimizer | None = None) -> dict[str, Replaced]:
        """Close a step, on all ranks; what moved, by layer, where this step decides and moving is worth it."""
        self.steps += 1
        if self.steps % self.every:
            return {}
        done: dict[str, tuple[Placement, Migration, list[float]]] = {}
        for (name, (_, bank)), told in zip(self._layers.items(), self._decided(), strict=True):
            *slots, before, after = told
            placement = Placement(tuple(map(int, slots)), bank.num_experts, bank.placement.ranks)
            if placement != bank.placement:
                done[name] = placement, migrate(bank, placement, optimiser), [before, after]
        sent = torch.tensor([migration.bytes_sent for _, migration, _ in done.values()], dtype=torch.int64)
        if done:
            dist.all_reduce(sent)
        return {
            name: Replaced(placement, migration.moved, migration.copied, num_bytes, *gains)
            for (name, (placement, migration, gains)), num_bytes in zip(done.items(), sent.tolist(), strict=True)
        }

    def state(self) -> dict[str, Tensor]:
        """What decides how experts move from here on, the same on every rank."""
        found = {"steps": torch.tensor([self.steps])}
        for name, (_, bank) in self._layers.items():
            loads = [torch.from_numpy(load) for load in self._memories[name].loads]
            found[f"{name}.loads"] = (
                torch.stack(loads) if loads else torch.zeros(0, bank.num_experts, dtype=torch.float64)
            )
            found[f"{name}.slots"] = torch.tensor(bank.placement.expert_of_slot)
            found[f"{name}.ranks"] = torch.tensor([bank.placement.ranks])
        return found

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Be as another was when it gave this state; the weights for its placement are brought by others.

        Experts stay where they are if there are other ranks or slots now. An empty state is that of the beginning.
        """
        self.steps = int(state["steps"][0]) if state else 0
        for name, (_, bank) in self._layers.items():
            self._memories[name].loads.clear()
            if not state:
                continue
            self._memories[name].loads.extend(state[f"{name}.loads"].double().numpy())
            ranks, slots = int(state[f"{name}.ranks"][0]), tuple(state[f"{name}.slots"].tolist())
            if (ranks, len(slots)) == (bank.placement.ranks, len(bank.placement.expert_of_slot)):
                bank.placement = Placement(slots, bank.num_experts, ranks)

    def _check(self, policy: str, bank: ParallelExperts) -> None:
        """Raise ValueError where the policy's placements do not fit the slots that there are."""
        check_movable(bank.local)
        tried = POLICIES[policy](np.ones((1, bank.num_experts)), self._cluster(bank), bank.placement)
        if tried.slots_per_rank != bank.placement.slots_per_rank:
            raise ValueError(
                f"{policy} holds every expert once, and {bank.num_experts} experts have "
                f"{len(bank.placement.expert_of_slot)} slots; choose one of {', '.join(sorted(REPLICATING))}"
            )

    def _decided(self) -> list[list[float]]:
        """For every layer its slots and the busiest rank's load before and after, as the first rank finds it."""
        device = next(parameter.device for _, bank in self._layers.values() for parameter in bank.parameters())
        sizes = [len(bank.placement.expert_of_slot) for _, bank in self._layers.values()]
        told = torch.zeros(sum(sizes) + 2 * len(sizes), dtype=torch.float64, device=device)
        if dist.get_rank() == 0:
            found = [number for name, (_, bank) in self._layers.items() for number in self._decide(name, bank)]
            told.copy_(torch.tensor(found, dtype=torch.float64))
        dist.broadcast(told, 0)
        return [part.tolist() for part in told.split([size + 2 for size in sizes])]

    def _decide(self, name: str, bank: ParallelExperts) -> list[float]:
        before, history = bank.placement, np.stack(list(self._memories[name].loads))
        forecast = self.predictor(history, self.every) * history.sum(1).mean()
        seen = history if self.policy in OF_THE_PAST else forecast
        after = POLICIES[self.policy](seen, self._cluster(bank), before)
        load = forecast.mean(0).tolist()
        if max(before.load_per_rank(load)) < self.gain * max(after.load_per_rank(load)):
            after = before
        return [*after.expert_of_slot, *(1 / placement.balancedness(load) for placement in (before, after))]

    def _cluster(self, bank: ParallelExperts) -> Cluster:
        ranks = bank.placement.ranks
        nodes = max(1, ranks // min(ranks, self.mesh.ranks_per_node))
        element = next(bank.parameters()).element_size()
        cost = LayerCost(bank.width, bank.parameters_per_expert(), element, **self.speeds)
        return Cluster(ranks, len(bank.placement.expert_of_slot), nodes, self.groups, cost)


def _spread_layers(model: nn.Module) -> dict[str, tuple[MoE, ParallelExperts]]:
    """The MoE layers of a model whose experts are spread, with those experts."""
    found: dict[str, tuple[MoE, ParallelExperts]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            for _, bank in parallel_banks(module.experts):
                found[name] = module, bank
    return found
