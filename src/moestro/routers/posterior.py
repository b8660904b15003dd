"""Which domain a text comes from, judged by how well each domain's expert predicts it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Window = Literal["all", "one"]


def domain_posterior(
    log_likelihood: Tensor, prior: Tensor, window: Window = "all", keep: int | None = None
) -> Tensor:
    """Weights of the domains' experts at every token, from the tokens before it.

        w[j, t] = p_j(x_<t) pi_j / sum_i p_i(x_<t) pi_i        Gururangan et al. 2022 (DEMix), section 5

    The released code looks at one token only: `w[j, t] ~ p_j(x_{t-1} | x_<t-1) pi_j`, with equal weights at the
    first token: `window="one"`.

    Args:
        log_likelihood: log p_j(x_t | x_<t) of the text's own tokens.
        prior: pi, sums to 1.
        window: tokens that the weights look back at.
        keep: only the so many largest weights stay, renormalised; None = all.

    Shapes: log_likelihood `[domains, tokens]`, prior `[domains]` -> `[domains, tokens]`, columns sum to 1.

    Raises:
        ValueError: more domains to keep than there are.
    """
    num_domains = len(log_likelihood)
    if keep is not None and not 1 <= keep <= num_domains:
        raise ValueError(f"keep={keep} must be between 1 and the {num_domains} domains")
    if window == "all":
        seen = log_likelihood.cumsum(1).roll(1, dims=1)
    else:
        seen = log_likelihood.roll(1, dims=1)
    logits = seen + prior.log().unsqueeze(1)
    logits[:, :1] = prior.log().unsqueeze(1) if window == "all" else 0.0
    if keep is not None:
        low = logits.sort(dim=0, descending=True, stable=True).indices[keep:]
        logits = logits.scatter(0, low, -torch.inf)
    return logits.softmax(0)


def mix_predictions(log_probs: Tensor, posterior: Tensor) -> Tensor:
    """The mixture of the experts' predictions: `log sum_j w[j, t] p_j(. | x_<t)`.

    Shapes: log_probs `[domains, tokens, vocabulary]`, posterior `[domains, tokens]` -> `[tokens, vocabulary]`.
    """
    return (log_probs + posterior.log().unsqueeze(-1)).logsumexp(0)


def updated_prior(prior: Tensor, posterior: Tensor, rate: float = 0.3) -> Tensor:
    """Moving average of posteriors: `(1 - rate) prior + rate mean over texts of w[:, last]`. `[domains]`.

    Shapes: posterior at the last token of each text of a block `[domains, texts]`.
    """
    return (1 - rate) * prior + rate * posterior.mean(1)
