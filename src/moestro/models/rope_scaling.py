"""Rotary frequencies for sequences longer than those of pretraining, in the three static ways that models use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Scaling = Mapping[str, Any]


def rotary_frequencies(width: int, theta: float, scaling: Scaling | None) -> tuple[Tensor, float]:
    """Angle per position of each pair of features, and what cosines and sines are multiplied with.

    Args:
        width: features to rotate.
        theta: base of the frequencies.
        scaling: `rope_type` (linear, llama3 or yarn) and its numbers, under the names of config.json; None = none.

    Raises:
        ValueError: another type, or a number that it needs and does not get.

    Shapes: -> `[width / 2]`.
    """
    frequency = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    if scaling is None:
        return frequency, 1.0
    kind = str(scaling.get("rope_type"))
    if kind not in KINDS:
        raise ValueError(f"rope_type={kind!r}; rotary positions are scaled by {', '.join(KINDS)}, or not at all")
    try:
        return KINDS[kind](frequency, theta, scaling)
    except KeyError as error:
        raise ValueError(f"{kind} scaling of rotary positions needs {error.args[0]}") from None


def yarn_temperature(scaling: Scaling | None) -> float:
    """What the scores of latent attention are multiplied with under YaRN: `mscale^2` (DeepSeek-AI 2024, V2)."""
    if scaling is None or scaling.get("rope_type") != "yarn" or not scaling.get("mscale_all_dim"):
        return 1.0
    return _magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _linear(frequency: Tensor, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """Positions divided by a factor (Chen et al. 2023)."""
    return frequency / scaling["factor"], 1.0


def _llama3(frequency: Tensor, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """Slow frequencies divided by a factor, fast ones kept, a ramp in between (Meta 2024, Llama 3.1)."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * frequency / (2 * math.pi)  # over the length of pretraining
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * frequency / factor + ramp * frequency, 1.0


def _yarn(frequency: Tensor, theta: float, scaling: Scaling) -> tuple[Tensor, float]:
    """The same with a ramp over the pairs, and hotter attention (Peng et al. 2023, sections 3.2-3.4)."""
    factor, pairs = scaling["factor"], len(frequency)
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    length = scaling["original_max_position_embeddings"]
    low, high = (
        2 * pairs * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)
    )
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = ((torch.arange(pairs).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency / factor * ramp + frequency * (1 - ramp), _yarn_magnitude(scaling)


def _yarn_magnitude(scaling: Scaling) -> float:
    given, factor = scaling.get("attention_factor"), scaling["factor"]
    if given is not None:
        return float(given)
    own, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if own and everywhere:
        return _magnitude(factor, own) / _magnitude(factor, everywhere)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, strength: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


KINDS: Mapping[str, Callable[[Tensor, float, Scaling], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
