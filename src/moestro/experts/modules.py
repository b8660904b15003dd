"""Any list of modules as experts: slow, and as general as it gets."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moestro.experts.base import Experts, Piece


class ModuleExperts(Experts):
    """A bank of arbitrary modules, each mapping `[rows, width]` to `[rows, width]`.

    Every module runs once per call, also without rows, so that all parameters receive a gradient.

    Args:
        modules: one per expert; they may differ.
        width: model width.

    Raises:
        ValueError: an empty list.
    """

    def __init__(self, modules: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)
        if not len(self.experts):
            raise ValueError("a bank needs at least one module, got none")
        self.num_experts, self.width = len(self.experts), width

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        groups = rows.split(offsets.diff().tolist())
        return torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])

    def merged(self, mixture: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Mix parameters of modules of one architecture, see `Experts.merged`.

        Raises:
            ValueError: modules whose parameters differ in name or shape have no mixture.
        """
        shapes = [{name: p.shape for name, p in expert.named_parameters()} for expert in self.experts]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("experts of different shapes cannot be merged; use modules of one architecture")
        if not len(mixture):
            return rows
        parameters = [dict(expert.named_parameters()) for expert in self.experts]
        stacked = {name: torch.stack([each[name] for each in parameters]) for name in shapes[0]}
        mixed = {name: torch.tensordot(mixture.to(p.dtype), p, dims=1) for name, p in stacked.items()}
        groups = rows.split(offsets.diff().tolist())
        return torch.cat(
            [
                functional_call(self.experts[0], {name: p[v] for name, p in mixed.items()}, (group,))
                for v, group in enumerate(groups)
            ]
        )

    def share(self, experts: Sequence[int]) -> ModuleExperts:
        return ModuleExperts([copy.deepcopy(self.experts[expert]) for expert in experts], self.width)

    def parameters_of(self, expert: int) -> dict[str, Piece]:
        return {name: Piece(parameter, None) for name, parameter in self.experts[expert].named_parameters()}
