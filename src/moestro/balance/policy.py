"""Policy gradients for routers that sample."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.routing import Decision


def policy_loss(
    decisions: Iterable[Decision], reward: Tensor, entropy: float = 0.0, normalise: bool = False
) -> Tensor:
    """REINFORCE with a learned baseline, summed over layers, mean over tokens.

        -(R_t - b(x_t)) log pi(e_t | x_t) + huber(b(x_t), R_t) - entropy * H(pi(. | x_t))        Clark et al. 2022

    Gradients reach the policy through log pi and the entropy, the baseline through the Huber term only.

    Args:
        decisions: of `Policy` routers that saw the same tokens, e.g. `sum(log.decisions.values(), [])`.
        reward: R, for a language model minus the cross entropy of the token predicted at t; gets no gradient.
        entropy: coefficient of the entropy of the policy.
        normalise: divide advantages by their standard deviation.

    Shapes: reward `[tokens]` -> scalar.

    Raises:
        ValueError: a reward that is not one per token, or a decision of another kind of router.
    """
    return torch.stack([_one(decision, reward.detach(), entropy, normalise) for decision in decisions]).sum()


def _one(decision: Decision, reward: Tensor, entropy: float, normalise: bool) -> Tensor:
    value, logits = decision.notes.get("value"), decision.logits
    if value is None or logits is None:
        raise ValueError("policy gradients need a Policy router, which notes its choice and baseline")
    if reward.shape != value.shape:
        raise ValueError(f"reward has shape {list(reward.shape)}; pass one per token, {list(value.shape)}")
    valid = valid_tokens(decision, len(value))
    log_policy = logits.log_softmax(-1)
    advantage = (reward - value).detach()
    if normalise and int(valid.sum()) > 1:
        advantage = advantage / advantage[valid].std().clamp(min=1e-6)
    acted = log_policy.gather(1, decision.notes["choice"]).squeeze(1)
    each = F.huber_loss(value, reward, reduction="none") - advantage * acted
    each = each + entropy * (log_policy.exp() * log_policy).sum(-1)
    return (each * valid).sum() / valid.sum().clamp(min=1)
