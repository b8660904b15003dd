"""A mixture of experts, or a dense network, on one new token."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.experts import run_chosen
from moestro.inference.moment import Moment
from moestro.inference.single_row import Norm, as_map
from moestro.layers import MoE
from moestro.models import Block
from moestro.routers import Router, TokenChoice
from moestro.routers.capacities import Dropless
from moestro.routers.scorers import Biased, InputJitter, Linear
from moestro.routers.selects import BiasedSelection, GroupLimitedTopK, TopK

_PLAIN = (Linear, Biased, InputJitter, TopK, GroupLimitedTopK, BiasedSelection, Dropless)


def routes_plainly(moe: MoE) -> bool:
    """Whether a layer's routing is a choice of a fixed number of experts, by what the token itself is."""
    router = moe.router
    if type(router) is not TokenChoice:
        return False
    return all(
        type(part) in _PLAIN for slot in (router.scorer, router.select, router.capacity) for part in slot.modules()
    )


class MixtureStep:
    """Routing, the chosen experts and the residual connection.

    The slots of the router run as they are; left out are the noise, which is for training, sorting the pairs by
    expert, and the Decision.

    Args:
        block: whose mixture `routes_plainly`.
        dtype: of the model.

    Shapes: x `[1, width]` float32 -> the same.
    """

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        assert block.moe is not None
        self.norm, self.choice, self.experts = Norm(block.ffn_norm), Choice(block.moe.router), block.moe.experts
        self.shared = None if block.moe.shared is None else as_map(block.moe.shared, dtype)
        self.dtype = dtype

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        row = self.norm(x)
        index, weight = self.choice(row)
        if self.shared is not None:
            x = x + self.shared(row)
        return x + run_chosen(self.experts, row.to(self.dtype), index.tolist(), weight)


class Choice:
    """The experts that a row goes to.

    Args:
        router: of a mixture that `routes_plainly`.

    Shapes: row `[1, width]` float32 -> experts `[chosen]` int64 and their weights `[1, chosen]`.
    """

    def __init__(self, router: Router) -> None:
        assert isinstance(router, TokenChoice)
        self.router, scorer = router, router.scorer
        self.scorer = scorer.weight.detach().float() if type(scorer) is Linear else None

    def __call__(self, row: Tensor) -> tuple[Tensor, Tensor]:
        router = self.router
        logits = router.scorer(row) if self.scorer is None else F.linear(row, self.scorer)
        probs = router.gate(logits)
        chosen = router.select(probs)
        return chosen.index[0], router.weigh(logits, probs, chosen)


class ModuleStep:
    """Any other feed-forward layer and its residual connection: the module itself."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.norm, self.block, self.dtype = Norm(block.ffn_norm), block, dtype

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        context = moment.context
        if moment.decisions:
            context = replace(context, previous=moment.decisions.pop())
        row = self.norm(x).to(self.dtype)
        return x + self.block.feed_forward(row.unsqueeze(0), context, moment.decisions)[0]
