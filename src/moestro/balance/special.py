"""Losses of single papers: budgets, places in a node, locality, tasks, and tokens with one expert only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.counts import chosen_by, facts, noted, probs_of
from moestro.balance.levels import group_size
from moestro.balance.loss import Sums, TokenLoss
from moestro.routing import Decision
from moestro.routing.context import home_devices


@dataclass(frozen=True)
class GateBudget(TokenLoss):
    """Holds the mean weight of the routed part at a budget: `|mean(g) - budget|`, g = 1 - shared weight.

    NLLB team 2022, section 6.2.2. The released code pools all layers first (`RoutingLog(layers="pooled")`); by
    default each layer keeps to the budget.

    Attributes:
        budget: between 0 and 1.
    """

    budget: float

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget={self.budget} must be between 0 and 1")

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without a noted shared weight."""
        return {"gate": 1 - noted(decision, "shared_weight")}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["tokens"]
        return (sums["gate"] / tokens.clamp(min=1) - self.budget).abs() * (tokens > 0)


@dataclass(frozen=True)
class PlaceBalance(TokenLoss):
    """Load times probability over places: experts of the same number in all nodes count together.

        m * sum_j f_j Q_j,   f_j = share of choices at place j,   Q_j = mean over tokens of sum_i p_(i,j)
        He et al. 2022 (SMILE), section 3.2

    Attributes:
        num_nodes: groups of consecutive experts; must divide their number.
    """

    num_nodes: int

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, counted = facts(decision)
        places = group_size(probs.shape[1], self.num_nodes)
        chosen = chosen_by(choice % places, counted, places, probs.dtype)
        return {
            "chosen": chosen,
            "choices": counted.sum(1),
            "probs": probs.unflatten(1, (self.num_nodes, places)).sum(1),
        }

    def value(self, sums: Sums) -> Tensor:
        f = sums["chosen"] / sums["choices"].clamp(min=1).unsqueeze(-1)
        return f.shape[-1] * (f * sums["probs"] / sums["tokens"].clamp(min=1).unsqueeze(-1)).sum(-1)


@dataclass(frozen=True)
class Locality(TokenLoss):
    """Pulls tokens to experts of their own device.

        KL(D_c || D_l),   D_c = devices that a device's tokens go to (mean probabilities),   D_l = its own
        Li et al. 2024 (LocMoE), eq. 9; averaged over devices

    D_l is smoothed, for the divergence from a single device is infinite (our choice, the paper says nothing).
    Token t lives on `Context.device`, or without it on device `t * D // T` of the call; experts lie in D
    consecutive groups.

    Attributes:
        num_devices: D, at least 2.
        smoothing: share of D_l spread over all devices.
    """

    num_devices: int
    smoothing: float = 0.01

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices, or a device out of range."""
        probs, _, _ = facts(decision)
        group_size(probs.shape[1], self.num_devices)
        home = home_devices(decision.notes.get("device"), len(probs), self.num_devices, probs.device)
        at_home = torch.zeros(len(probs), self.num_devices, dtype=probs.dtype, device=probs.device)
        at_home = at_home.scatter(1, home.unsqueeze(1), 1.0)
        share = probs.unflatten(1, (self.num_devices, -1)).sum(-1)
        return {"share": at_home.unsqueeze(2) * share.unsqueeze(1), "home": at_home}

    def value(self, sums: Sums) -> Tensor:
        tokens = sums["home"]
        current = sums["share"] / tokens.clamp(min=1).unsqueeze(-1)
        local = torch.eye(self.num_devices, dtype=current.dtype, device=current.device)
        local = (1 - self.smoothing) * local + self.smoothing / self.num_devices
        divergence = torch.xlogy(current, current.clamp(min=1e-30)) - current * local.log()
        return divergence.sum((-2, -1)) / (tokens > 0).sum(-1).clamp(min=1)


@dataclass(frozen=True)
class TaskInformation(TokenLoss):
    """Minus the mutual information of task and expert: each task its own experts, all experts used.

        -sum_(m,e) Q log(Q / (P_m P_e)),   Q[m, e] = sum over tokens of task m of p_e / all tokens
        Chen et al. 2023 (Mod-Squad), eq. 5

    From -log of the number of tasks to 0.

    Attributes:
        num_domains: tasks.
    """

    num_domains: int

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or domains."""
        probs, domain = probs_of(decision), noted(decision, "domain")
        if "valid" in decision.notes:
            domain = domain.where(decision.notes["valid"], 0)
        task = torch.zeros(len(probs), self.num_domains, dtype=probs.dtype, device=probs.device)
        task = task.scatter(1, domain.unsqueeze(1), 1.0)
        return {"joint": task.unsqueeze(2) * (probs / probs.sum(-1, keepdim=True)).unsqueeze(1)}

    def value(self, sums: Sums) -> Tensor:
        joint = sums["joint"] / sums["tokens"].clamp(min=1)[..., None, None]
        apart = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
        tiny = torch.finfo(joint.dtype).tiny
        each = torch.xlogy(joint, joint.clamp(min=tiny)) - torch.xlogy(joint, apart.clamp(min=tiny))
        return -each.sum((-2, -1))


class SingleChoiceBalance(TokenLoss):
    """Load times probability whose load is of the tokens that use one expert only.

    E * sum_e f_e P_e,   f_e = share of e among tokens with one expert,   P_e = mean over all tokens
    Li et al. 2023 (adaptive gating), section 3.2; 0 if every token uses several
    """

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, counted = facts(decision)
        single = (counted & (counted.sum(1, keepdim=True) == 1))[:, :1]
        chosen = chosen_by(choice[:, :1], single, probs.shape[1], probs.dtype)
        return {"chosen": chosen, "singles": single.sum(1), "probs": probs}

    def value(self, sums: Sums) -> Tensor:
        f = sums["chosen"] / sums["singles"].clamp(min=1).unsqueeze(-1)
        return f.shape[-1] * (f * sums["probs"] / sums["tokens"].clamp(min=1).unsqueeze(-1)).sum(-1)


single_choice_balance = SingleChoiceBalance()
