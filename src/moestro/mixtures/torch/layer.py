"""A fitted mixture as a layer: the same function, trainable by gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from moestro.experts import AffineExperts
from moestro.layers import MoE
from moestro.mixtures import experts as kinds
from moestro.mixtures.base import MixtureOfExperts
from moestro.mixtures.experts.base import Expert
from moestro.mixtures.gates import ConstantGate, ExponentialFamilyGate, GaussianGate, Params, SoftmaxGate
from moestro.mixtures.numerics import Array
from moestro.mixtures.rows import Scaling
from moestro.routers import Scorer, TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routers.gate_networks import Affine, Densities, Tree


def to_moe(model: Any, dtype: torch.dtype = torch.float64) -> MoE:
    """The layer that computes what a fitted mixture predicts.

        layer(x) = sum_i g_i(x) μ_i(x)        μ_i: mean, or class probabilities, of expert i

    Its router weighs every expert (softmax, tree of softmaxes, Gaussian densities, constant, an exponential family
    whose columns are all Gaussian or all of a kind that makes affine logits), its experts are
    affine with the link of the family: none (normal, Laplace, Student, skewed: the skew moves the bias), `exp`
    (Poisson, gamma), `softmax` (classes). Spreads and shapes have no place in a layer; `from_moe` finds spreads
    again. Parameters are in the units of the data, so train on standardised data or with small steps.

    Args:
        model: a fitted `MixtureOfExpertsRegressor` or `MixtureOfExpertsClassifier`.
        dtype: of the parameters; in float32 inputs far from 0, such as years, cost digits.

    Shapes: x `[..., features]` -> `[..., outputs]` as `predict` of a two-dimensional y, or `[..., classes]` as
    `predict_proba`.

    Raises:
        ValueError: an estimator, gate or expert that is no gate times affine map, or an expert without a mean.
    """
    if not isinstance(model, MixtureOfExperts):
        raise ValueError(
            f"{type(model).__name__} has no gate and affine experts that a layer could hold; "
            "pass a fitted MixtureOfExpertsRegressor or MixtureOfExpertsClassifier"
        )
    check_is_fitted(model)
    mixture, sides = model.mixture_, model._sides
    for part, known in ((mixture.gate, _SCORERS), (mixture.expert, _BANKS)):
        if type(part) not in known:
            names = ", ".join(kind.__name__ for kind in known)
            raise ValueError(f"{type(part).__name__} cannot become part of a layer; fit one of {names}")
    scorer = _SCORERS[type(mixture.gate)](mixture.gate_params, sides.gate)
    experts = _BANKS[type(mixture.expert)](mixture.expert, mixture.expert_params, sides.expert)
    router = TokenChoice(scorer, EveryExpert(scorer.num_experts), softmax, as_is)
    return MoE(router, experts).to(dtype)


def _set(parameter: Tensor, value: Array) -> None:
    parameter.data = torch.from_numpy(np.array(value, dtype=np.float64, order="C"))


def _affine(weight: Array, bias: Array) -> Affine:
    scorer = Affine(weight.shape[1], len(bias))
    _set(scorer.weight, weight)
    _set(scorer.bias, bias)
    return scorer


def _softmax_scorer(params: Params, scaling: Scaling) -> Scorer:
    planes = [scaling.plane(np.pad(coef, ((0, 0), (0, 1), (0, 0)))) for coef in params["coef"]]
    levels = [_affine(slope.reshape(-1, slope.shape[-1]), bias.ravel()) for bias, slope in planes]
    if len(levels) == 1:
        return levels[0]
    tree = Tree(scaling.num_features, [bias.shape[1] for bias, _ in planes])
    for level, ours in zip(tree.levels, levels, strict=True):
        level.load_state_dict(ours.state_dict(), assign=True)
    return tree


def _gaussian_scorer(params: Params, scaling: Scaling) -> Scorer:
    if scaling.columns is not None:
        raise ValueError(
            "a gate of densities of some of the features cannot become part of a layer; leave out gate_features or "
            "fit gate='softmax'"
        )
    num, width = params["mean"].shape
    lower = np.linalg.cholesky(params["covariance"] * np.outer(scaling.x_scale, scaling.x_scale))
    factor = np.linalg.inv(lower)  # S^-1 = L'L
    diagonal = np.einsum("nuu->nu", factor)
    diagonal[:] = np.log(diagonal)
    scorer = Densities(width, num)
    _set(scorer.log_alpha, params["log_weight"])
    _set(scorer.mean, scaling.x_center + params["mean"] * scaling.x_scale)
    _set(scorer.factor, np.tril(factor))
    return scorer


def _constant_scorer(params: Params, scaling: Scaling) -> Scorer:
    bias = params["log_weight"]
    return _affine(np.zeros((len(bias), scaling.num_features)), bias)


# slope and constant of a column's log-density, where it is affine in the column up to what all experts share
_AFFINE_FAMILIES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "bernoulli": lambda p: (np.log(p) - np.log1p(-p), np.log1p(-p)),
    "poisson": lambda rate: (np.log(rate), -rate),
    "exponential": lambda mean: (-1 / mean, -np.log(mean)),
}


def _exponential_scorer(params: Params, scaling: Scaling) -> Scorer:
    names, columns = params["families"], params["columns"]
    raw = replace(scaling, x_center=np.zeros(len(names)), x_scale=np.ones(len(names)))  # the gate saw raw x
    if set(names) == {"gaussian"}:
        mean, variance = (np.stack([column[:, k] for column in columns], axis=1) for k in (0, 1))
        matrices = variance[:, :, None] * np.eye(len(names))
        return _gaussian_scorer({"log_weight": params["log_weight"], "mean": mean, "covariance": matrices}, raw)
    if not set(names) <= set(_AFFINE_FAMILIES):
        raise ValueError(
            f"a gate of the families {', '.join(sorted(set(names)))} cannot become part of a layer; fit one whose "
            f"columns are all gaussian, or all among {', '.join(_AFFINE_FAMILIES)}"
        )
    parts = [_AFFINE_FAMILIES[name](column[:, 0]) for name, column in zip(names, columns, strict=True)]
    slopes, constants = (np.stack(each, axis=1) for each in zip(*parts, strict=True))
    bias = params["log_weight"] + constants.sum(1)
    return _affine(raw.plane(np.column_stack([bias, slopes]))[1], bias)


_SCORERS: dict[type, Callable[[Params, Scaling], Scorer]] = {
    SoftmaxGate: _softmax_scorer,
    GaussianGate: _gaussian_scorer,
    ExponentialFamilyGate: _exponential_scorer,
    ConstantGate: _constant_scorer,
}


def _bank(bias: Array, slope: Array, link: str) -> AffineExperts:
    """Shapes: bias `[experts, outputs]`, slope `[experts, outputs, features]`."""
    experts = AffineExperts(len(bias), slope.shape[2], slope.shape[1], link)
    _set(experts.weight, slope.transpose(0, 2, 1))
    _set(experts.bias, bias)
    return experts


def _linear_bank(expert: Expert, params: Params, scaling: Scaling) -> AffineExperts:
    """Means that are affine in x, read off at the centre and one step along each input."""
    width = len(scaling.x_center)
    mean = expert.mean(params, expert.design(np.vstack([np.zeros(width), np.eye(width)])))
    if not np.isfinite(mean).all():
        raise ValueError(f"an expert of {expert!r} has no mean that a layer could compute; fit lighter tails")
    coef = np.concatenate([mean[:1], mean[1:] - mean[0]])  # [1 + features, experts, outputs]
    bias, slope = scaling.plane(coef.transpose(1, 2, 0))
    return _bank(scaling.y_center + bias * scaling.y_scale, slope * scaling.y_scale, "identity")


def _exp_bank(expert: Expert, params: Params, scaling: Scaling) -> AffineExperts:
    if getattr(expert, "exposure", None) is not None:
        raise ValueError(
            f"{expert!r} multiplies by a column of X, which a layer of gate and experts cannot; drop it"
        )
    return _bank(*scaling.plane(params["coef"].transpose(0, 2, 1)), "exp")


def _class_bank(expert: Expert, params: Params, scaling: Scaling) -> AffineExperts:
    coef = params["coef"]  # [experts, classes - 1, p]; the last class has logit 0
    missing = 1 + len(scaling.x_center) - coef.shape[2]  # experts that ignore the inputs
    return _bank(*scaling.plane(np.pad(coef, ((0, 0), (0, 1), (0, missing)))), "softmax")


_BANKS: dict[type, Callable[[Expert, Params, Scaling], AffineExperts]] = {
    kinds.GaussianExpert: _linear_bank,
    kinds.ConstantExpert: _linear_bank,
    kinds.LaplaceExpert: _linear_bank,
    kinds.StudentExpert: _linear_bank,
    kinds.SkewNormalExpert: _linear_bank,
    kinds.SkewTExpert: _linear_bank,
    kinds.PoissonExpert: _exp_bank,
    kinds.GammaExpert: _exp_bank,
    kinds.MultinomialExpert: _class_bank,
    kinds.LogisticExpert: _class_bank,
    kinds.ConstantClassExpert: _class_bank,
}
