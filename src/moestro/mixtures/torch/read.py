"""A dense-gated layer read back as a fitted mixture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor

from moestro.experts import AffineExperts
from moestro.layers import MoE
from moestro.mixtures import covariance as shapes
from moestro.mixtures.base import MixtureOfExperts
from moestro.mixtures.classifier import MixtureOfExpertsClassifier
from moestro.mixtures.experts import Expert, GaussianExpert
from moestro.mixtures.fitting import em
from moestro.mixtures.gates import Params
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, predictions, scatter, softmax_rows
from moestro.mixtures.regressor import MixtureOfExpertsRegressor
from moestro.mixtures.rows import Rows, Scaling, Sides
from moestro.routers import Linear, Scorer, TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routers.gate_networks import Affine, Densities, Tree

_MOST_STEPS = 1000


def from_moe(layer: MoE, X: Any, y: Any, sample_weight: Any = None) -> MixtureOfExperts:
    """The estimator whose gate and experts are those of a layer.

    `predict` (or `predict_proba`) is what the layer computes. A layer has no spread, so the variances of normal
    experts are those most likely for the given rows, found by EM with everything else held fixed. `summary`,
    `responsibilities`, criteria, intervals and sampling follow; with `set_params(warm_start=True)`, `fit` goes on.

    Args:
        layer: affine experts without link, under `exp` (counts) or under `softmax` (classes), all of them weighed
            by a softmax of affine logits, of a tree of them, or of Gaussian log-densities.
        X: inputs `[rows, features]`.
        y: targets; classes in sorted order are the outputs of the experts.
        sample_weight: how often each row counts.

    Raises:
        ValueError: a layer of another kind, or rows that do not fit it.
    """
    bank, scorer = _parts(layer)
    estimator = _estimator(bank, scorer)
    gate, expert, _ = estimator._parts()
    x, target = estimator._validate(X, y)
    target = estimator._encode(target)
    estimator._check_target(target, expert)
    if (x.shape[1], target.shape[1]) != (bank.width, bank.out_width):
        raise ValueError(
            f"the layer maps {bank.width} inputs to {bank.out_width} outputs, but X has {x.shape[1]} columns "
            f"and y {target.shape[1]} outputs or classes; pass the rows that it was trained on"
        )
    weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
    scaling = Scaling.of(x, target, weight, expert.target == "real")
    sides = Sides.of(scaling)
    rows = estimator._rows(gate, expert, sides, x, target, weight)
    first = Mixture(gate, expert, _gate_params(scorer, scaling), _expert_params(bank, scaling))
    return estimator._keep(_with_spread(first, rows, estimator.tol), rows, sides)


def _parts(layer: Any) -> tuple[AffineExperts, Scorer]:
    router = getattr(layer, "router", None)
    dense = isinstance(router, TokenChoice) and isinstance(router.select, EveryExpert)
    if (
        not isinstance(layer, MoE)
        or not isinstance(router, TokenChoice)
        or not dense
        or (router.gate, router.weigh) != (softmax, as_is)
        or not isinstance(router.scorer, Linear | Affine | Tree | Densities)
    ):
        raise ValueError(
            "from_moe reads a MoE whose router weighs all experts by the softmax of affine logits, of a tree or of "
            "densities (method dense-softmax); this layer has another router"
        )
    bank = layer.experts
    if layer.shared is not None or not isinstance(bank, AffineExperts) or bank.link in ("relu", "tanh"):
        raise ValueError(
            "from_moe reads AffineExperts with link 'identity', 'exp' or 'softmax' and no shared expert; "
            f"this layer has {type(bank).__name__}" + (" and a shared expert" if layer.shared else "")
        )
    return bank, router.scorer


def _estimator(bank: AffineExperts, scorer: Scorer) -> MixtureOfExperts:
    gate = "gaussian" if isinstance(scorer, Densities) else "softmax"
    options: dict[str, Any] = {"gate": gate, "n_init": 1}
    options |= {"branching": scorer.branching} if isinstance(scorer, Tree) else {"n_experts": bank.num_experts}
    if bank.link == "softmax":
        return MixtureOfExpertsClassifier(expert="multinomial", **options)
    return MixtureOfExpertsRegressor(expert="poisson" if bank.link == "exp" else "linear", **options)


def _array(value: Tensor) -> Array:
    return value.detach().to("cpu", torch.float64).numpy()


def _standard(slope: Array, bias: Array, scaling: Scaling) -> Array:
    """Linear predictors `[..., 1 + features]` in standardised inputs: the inverse of `Scaling.plane`."""
    return np.concatenate([(bias + slope @ scaling.x_center)[..., None], slope * scaling.x_scale], axis=-1)


def _gate_params(scorer: Scorer, scaling: Scaling) -> Params:
    if isinstance(scorer, Densities):
        return _density_params(scorer, scaling)
    levels: Iterable[Any] = scorer.levels if isinstance(scorer, Tree) else [scorer]
    coefs = []
    for level, num in zip(levels, getattr(scorer, "branching", [scorer.num_experts]), strict=True):
        weight = _array(level.weight)
        bias = _array(level.bias) if isinstance(level, Affine) else np.zeros(len(weight))
        coef = _standard(weight, bias, scaling).reshape(-1, num, 1 + weight.shape[1])
        coefs.append(coef[:, :-1] - coef[:, -1:])  # the last child has logit 0
    return {"coef": coefs}


def _density_params(scorer: Densities, scaling: Scaling) -> Params:
    log_alpha, factor = _array(scorer.log_alpha), np.tril(_array(scorer.factor), -1)
    diagonal = np.exp(np.einsum("nuu->nu", _array(scorer.factor)))
    factor += diagonal[:, :, None] * np.eye(factor.shape[1])
    lower = np.linalg.inv(factor) / scaling.x_scale[:, None]
    return {
        "log_weight": log_alpha - np.logaddexp.reduce(log_alpha),
        "mean": (_array(scorer.mean) - scaling.x_center) / scaling.x_scale,
        "covariance": lower @ lower.transpose(0, 2, 1),
    }


def _expert_params(bank: AffineExperts, scaling: Scaling) -> Params:
    slope, bias = _array(bank.weight).transpose(0, 2, 1), _array(bank.bias)
    if bank.link == "identity":
        slope, bias = slope / scaling.y_scale, (bias - scaling.y_center) / scaling.y_scale
    coef = _standard(slope, bias, scaling)  # [experts, outputs, 1 + features]
    if bank.link == "softmax":
        return {"coef": coef[:, :-1] - coef[:, -1:]}
    return {"coef": coef.transpose(0, 2, 1)}


def _with_spread(mixture: Mixture, rows: Rows, tol: float) -> em.Fit:
    """EM on the variances alone; nothing to do for families without one."""
    expert: Expert = mixture.expert
    if not isinstance(expert, GaussianExpert):
        return em.Fit(mixture, [mixture.objective(rows)], 1, True)
    fixed = mixture.expert_params
    error = rows.y[:, None, :] - predictions(rows.z, fixed["coef"])
    share, path = mixture.share(rows.u), []
    for step in range(_MOST_STEPS):
        mass = rows.weight[:, None] * share
        spread = shapes.maximise(scatter(error, mass), mass.sum(0), expert.covariance, rows.floor)
        mixture = Mixture(mixture.gate, expert, mixture.gate_params, {**fixed, "covariance": spread})
        value, share = softmax_rows(mixture.joint(rows.u, rows.z, rows.y))
        path.append(float(rows.weight @ value) - mixture.penalty(rows))
        if step and path[-1] - path[-2] <= tol * rows.total:
            return em.Fit(mixture, path, step + 1, True)
    return em.Fit(mixture, path, _MOST_STEPS, False)
