"""Moves experts while a model trains, when the loads that are foreseen make it worth it."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from moestro.balance.counts import chosen_load
from moestro.balance.log import RoutingLog
from moestro.experts.migration import Migration, migrate
from moestro.experts.parallel import ParallelExperts
from moestro.layers import MoE
from moestro.parallel import POLICIES, PREDICTORS, Cluster, Mesh


class Rebalancer:
    """Re-places the experts of a spread model every so many steps, with their optimiser's state.

        rebalancer = Rebalancer(model, mesh, every=100)
        for batch in batches:
            with log.recording():
                ...
            rebalancer.observe(log)               # after every recording
            optimiser.step()
            rebalancer.step(optimiser)            # after every optimiser step

    Loads are summed over all ranks, so every rank decides alike. A layer is left alone unless the busiest rank
    would have `gain` times as much to do without the move: the trigger of SmartMoE (Zhai et al. 2023), there 1.

    Args:
        model: after `moestro.layers.spread.spread`.
        mesh: its ranks.
        every: optimiser steps between decisions.
        policy: name in `moestro.parallel.POLICIES`.
        predictor: name in `moestro.parallel.PREDICTORS`, of the next `every` steps.
        gain: least gain for which a layer's experts move.
        history: steps that are remembered.
        groups: of experts, for node-limited routing.

    Raises:
        ValueError: unknown names, numbers out of range, or a model without spread experts.
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
    ) -> None:
        for name, known in (("policy", POLICIES), ("predictor", PREDICTORS)):
            word = policy if name == "policy" else predictor
            if word not in known:
                raise ValueError(f"unknown {name} {word!r}; there are {', '.join(known)}")
        if every < 1 or history < 1 or gain < 1:
            raise ValueError(f"every={every}, history={history} and gain={gain} must be at least 1")
        named = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        self._banks = {n: moe.experts for n, moe in named.items() if isinstance(moe.experts, ParallelExperts)}
        if not self._banks:
            raise ValueError("no layer of this model has its experts spread over ranks; call spread(...) first")
        self.mesh, self.every, self.gain, self.groups = mesh, every, gain, groups
        self.policy, self.predictor = POLICIES[policy], PREDICTORS[predictor]
        self._seen = {name: _zeros(bank) for name, bank in self._banks.items()}
        self._loads = {name: deque[np.ndarray](maxlen=history) for name in self._banks}
        self._steps = 0

    def observe(self, log: RoutingLog) -> None:
        """Count the choices of the log's last recording."""
        for name, seen in self._seen.items():
            for decision in log.decisions[name]:
                seen += chosen_load(decision).to(seen)

    @torch.no_grad()
    def step(self, optimiser: torch.optim.Optimizer | None = None) -> dict[str, Migration]:
        """Close a step, on all ranks; what moved, by layer, where this step decides and moving is worth it."""
        for name, seen in self._seen.items():
            dist.all_reduce(seen, group=self.mesh.dense)
            self._loads[name].append(seen.cpu().numpy().copy())
            seen.zero_()
        self._steps += 1
        if self._steps % self.every:
            return {}
        moved = {name: self._moved(name, bank, optimiser) for name, bank in self._banks.items()}
        return {name: migration for name, migration in moved.items() if migration is not None}

    def _moved(self, name: str, bank: ParallelExperts, optimiser: torch.optim.Optimizer | None) -> Migration | None:
        before, slots = bank.placement, len(bank.placement.expert_of_slot)
        forecast = self.predictor(np.stack(list(self._loads[name])), self.every)
        nodes = max(1, before.ranks // min(before.ranks, self.mesh.ranks_per_node))
        after = self.policy(forecast, Cluster(before.ranks, slots, nodes, self.groups))
        load = forecast.mean(0)
        if after.slots_per_rank != before.slots_per_rank:
            raise ValueError("this policy holds every expert once, and there are replicas; choose eplb or refined")
        if max(before.load_per_rank(load)) < self.gain * max(after.load_per_rank(load)):
            return None
        return migrate(bank, after, optimiser)


def _zeros(bank: ParallelExperts) -> torch.Tensor:
    return torch.zeros(bank.num_experts, dtype=torch.float64, device=next(bank.parameters()).device)
