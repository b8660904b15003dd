"""Losses of single papers: budgets, places in a node, locality, tasks, and tokens with one expert only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.counts import count, counted_choices, facts, noted, valid_tokens
from moestro.balance.levels import group_size
from moestro.balance.losses import cv_squared
from moestro.routing import Decision


@dataclass(frozen=True)
class GateBudget:
    """Holds the mean weight of the routed part at a budget: `|mean(g) - budget|`, g = 1 - shared weight.

    NLLB team 2022, section 6.2.2. The released code pools all layers first; here each layer keeps to the budget.

    Attributes:
        budget: between 0 and 1.
    """

    budget: float

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget={self.budget} must be between 0 and 1")

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without a noted shared weight."""
        gate = 1 - noted(decision, "shared_weight")
        valid = valid_tokens(decision, len(gate))
        mean = (gate * valid).sum() / valid.sum().clamp(min=1)
        return (mean - self.budget).abs() * valid.any()


@dataclass(frozen=True)
class PlaceBalance:
    """Load times probability over places: experts of the same number in all nodes count together.

        m * sum_j f_j Q_j,   f_j = share of choices at place j,   Q_j = mean over tokens of sum_i p_(i,j)
        He et al. 2022 (SMILE), section 3.2

    Attributes:
        num_nodes: groups of consecutive experts; must divide their number.
    """

    num_nodes: int

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, choice, valid = facts(decision)
        places = group_size(probs.shape[1], self.num_nodes)
        counted = counted_choices(decision, choice)
        f = count(choice % places, counted, places, probs.dtype) / counted.sum().clamp(min=1)
        mean = (probs * valid.unsqueeze(1)).sum(0) / valid.sum().clamp(min=1)
        return places * (f * mean.view(self.num_nodes, places).sum(0)).sum()


@dataclass(frozen=True)
class Locality:
    """Pulls tokens to experts of their own device.

        KL(D_c || D_l),   D_c = devices that a device's tokens go to (mean probabilities),   D_l = its own
        Li et al. 2024 (LocMoE), eq. 9; averaged over devices

    D_l is smoothed, for the divergence from a single device is infinite (our choice, the paper says nothing).
    Token t of T lives on device `t * D // T`; experts lie in D consecutive groups.

    Attributes:
        num_devices: D, at least 2.
        smoothing: share of D_l spread over all devices.
    """

    num_devices: int
    smoothing: float = 0.01

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities or choices."""
        probs, _, valid = facts(decision)
        group_size(probs.shape[1], self.num_devices)
        home = torch.arange(len(probs), device=probs.device) * self.num_devices // max(len(probs), 1)
        share = probs.unflatten(1, (self.num_devices, -1)).sum(-1) * valid.unsqueeze(1)
        sums = share.new_zeros(self.num_devices, self.num_devices).index_add(0, home, share)
        tokens = valid.new_zeros(self.num_devices, dtype=probs.dtype).index_add(0, home, valid.to(probs.dtype))
        current = sums / tokens.clamp(min=1).unsqueeze(1)
        local = torch.eye(self.num_devices, dtype=probs.dtype, device=probs.device)
        local = (1 - self.smoothing) * local + self.smoothing / self.num_devices
        divergence = torch.xlogy(current, current.clamp(min=1e-30)) - current * local.log()
        return divergence.sum() / (tokens > 0).sum().clamp(min=1)


@dataclass(frozen=True)
class TaskInformation:
    """Minus the mutual information of task and expert: each task its own experts, all experts used.

        -sum_(m,e) Q log(Q / (P_m P_e)),   Q[m, e] = sum over tokens of task m of p_e / all tokens
        Chen et al. 2023 (Mod-Squad), eq. 5; of one call

    From -log of the number of tasks to 0.

    Attributes:
        num_domains: tasks.
    """

    num_domains: int

    def __call__(self, decision: Decision) -> Tensor:
        """Raises ValueError for a decision without probabilities, choices or domains."""
        probs, _, valid = facts(decision)
        domain = noted(decision, "domain").where(valid, 0)
        weighted = probs / probs.sum(-1, keepdim=True) * valid.unsqueeze(1) / valid.sum().clamp(min=1)
        joint = probs.new_zeros(self.num_domains, probs.shape[1]).index_add(0, domain, weighted)
        apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        tiny = torch.finfo(probs.dtype).tiny
        return -(torch.xlogy(joint, joint.clamp(min=tiny)) - torch.xlogy(joint, apart.clamp(min=tiny))).sum()


def single_choice_balance(decision: Decision) -> Tensor:
    """Load times probability whose load is of the tokens that use one expert only.

        E * sum_e f_e P_e,   f_e = share of e among tokens with one expert,   P_e = mean over all tokens
        Li et al. 2023 (adaptive gating), section 3.2; 0 if every token uses several

    Raises:
        ValueError: a decision without probabilities or choices.
    """
    probs, choice, valid = facts(decision)
    counted = counted_choices(decision, choice)
    single = (counted & (counted.sum(1, keepdim=True) == 1))[:, :1]
    f = count(choice[:, :1], single, probs.shape[1], probs.dtype) / single.sum().clamp(min=1)
    mean = (probs * valid.unsqueeze(1)).sum(0) / valid.sum().clamp(min=1)
    return probs.shape[1] * (f * mean).sum()


def noted_load_cv_squared(decision: Decision) -> Tensor:
    """CV^2 of the smooth load that a router noted, `[experts]` (two levels: Shazeer et al. 2017, appendix B)."""
    return cv_squared(noted(decision, "smooth_load"))
