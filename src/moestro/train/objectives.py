"""What a language model is trained for: one pass or two, and what each of its tokens tells the routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from moestro.balance.consistency import two_pass_objective
from moestro.balance.policy import policy_loss
from moestro.layers import MoE
from moestro.routing import Decision


class Objective(ABC):
    """Turns the logits of a micro-batch into what is learned from.

    Attributes:
        passes: how often the model sees each micro-batch.
    """

    passes: ClassVar[int] = 1

    @abstractmethod
    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, decisions: Sequence[Decision]
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of a pass, and what to differentiate; both summed over tokens, so that parts add up.

        Args:
            logits: of each pass, `[tokens, classes]`.
            targets: `[tokens]` int64.
            decisions: of all layers and passes.
        """


class NextToken(Objective):
    """Cross entropy of the next token."""

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, decisions: Sequence[Decision]
    ) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits[0], targets, reduction="sum")
        return loss.detach(), loss


class TwoPasses(Objective):
    """Two passes with experts drawn anew, pulled together.

        CE(p) + CE(q) + alpha * sum over tokens of the symmetric divergence of p and q        Zuo et al. 2021, eq. 3

    Args:
        alpha: weight of the divergence (1 in the released code, up to 5 in the paper).
    """

    passes = 2

    def __init__(self, alpha: float = 1.0) -> None:
        if alpha < 0:
            raise ValueError(f"alpha={alpha} of the two passes' divergence must not be negative")
        self.alpha = alpha

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, decisions: Sequence[Decision]
    ) -> tuple[Tensor, Tensor]:
        first, second = logits
        entropies = [F.cross_entropy(each.detach(), targets, reduction="sum") for each in logits]
        return sum(entropies, targets.new_zeros(())) / 2, two_pass_objective(first, second, targets, self.alpha)


class PolicyGradient(Objective):
    """Cross entropy for the model; for the routers a reward, token by token: minus the cross entropy of the token.

        CE - (R_t - b(x_t)) log pi(e_t | x_t) + huber(b(x_t), R_t) - entropy H(pi),   R_t = -CE_t
        Clark et al. 2022, section 3.3 (RL-R); summed over layers

    Args:
        entropy: coefficient of the policy's entropy.
        normalise: divide advantages by their standard deviation over the micro-batch.
    """

    def __init__(self, entropy: float = 0.01, normalise: bool = False) -> None:
        self.entropy, self.normalise = entropy, normalise

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, decisions: Sequence[Decision]
    ) -> tuple[Tensor, Tensor]:
        each = F.cross_entropy(logits[0], targets, reduction="none")
        acted = [decision for decision in decisions if "value" in decision.notes]
        policy = policy_loss(acted, -each, self.entropy, self.normalise)  # a mean over tokens
        return each.detach().sum(), each.sum() + policy * len(targets)


OBJECTIVES: dict[str, type[Objective]] = {
    "next-token": NextToken,
    "two-passes": TwoPasses,
    "policy-gradient": PolicyGradient,
}


def objective_for(model: nn.Module) -> Objective:
    """What the routers of a model need to learn: their `objective`, next-token for all but a few.

    Raises:
        ValueError: layers that need different objectives.
    """
    wanted = {module.router.objective for module in model.modules() if isinstance(module, MoE)} or {"next-token"}
    if len(wanted) > 1:
        raise ValueError(f"layers of this model need different objectives: {', '.join(sorted(wanted))}")
    return OBJECTIVES[wanted.pop()]()
