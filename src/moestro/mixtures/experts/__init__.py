"""Experts: conditional densities of the target."""

from collections.abc import Callable
from functools import partial

from moestro.mixtures.experts.base import Expert
from moestro.mixtures.experts.classes import ConstantClassExpert, LogisticExpert, MultinomialExpert
from moestro.mixtures.experts.gaussian import ConstantExpert, GaussianExpert
from moestro.mixtures.experts.glm import GammaExpert, PoissonExpert
from moestro.mixtures.experts.laplace import LaplaceExpert
from moestro.mixtures.experts.skew import SkewNormalExpert, SkewTExpert
from moestro.mixtures.experts.student import StudentExpert

REGRESSION_EXPERTS: dict[str, Callable[[], Expert]] = {
    "linear": partial(GaussianExpert, covariance="diag"),
    "ridge": partial(GaussianExpert, covariance="diag", alpha=1.0),
    "gaussian": GaussianExpert,
    "constant": ConstantExpert,
    "laplace": LaplaceExpert,
    "student": StudentExpert,
    "skew-normal": SkewNormalExpert,
    "skew-t": SkewTExpert,
    "poisson": PoissonExpert,
    "gamma": GammaExpert,
}
CLASSIFICATION_EXPERTS: dict[str, Callable[[], Expert]] = {
    "multinomial": MultinomialExpert,
    "logistic": LogisticExpert,
    "constant": ConstantClassExpert,
}

__all__ = [
    "CLASSIFICATION_EXPERTS",
    "REGRESSION_EXPERTS",
    "ConstantClassExpert",
    "ConstantExpert",
    "Expert",
    "GammaExpert",
    "GaussianExpert",
    "LaplaceExpert",
    "LogisticExpert",
    "MultinomialExpert",
    "PoissonExpert",
    "SkewNormalExpert",
    "SkewTExpert",
    "StudentExpert",
]
