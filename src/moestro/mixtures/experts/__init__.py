"""Experts: conditional densities of the target."""

from collections.abc import Callable
from functools import partial

from sklearn.svm import SVC, SVR

from moestro.mixtures.elm import ELMClassifier, ELMRegressor
from moestro.mixtures.experts.base import Expert
from moestro.mixtures.experts.bayesian import BayesianExpert
from moestro.mixtures.experts.binomial import BinomialExpert
from moestro.mixtures.experts.classes import ConstantClassExpert, LogisticExpert, MultinomialExpert
from moestro.mixtures.experts.estimator import EstimatorClassExpert, EstimatorExpert
from moestro.mixtures.experts.gaussian import ConstantExpert, GaussianExpert
from moestro.mixtures.experts.glm import GammaExpert, PoissonExpert
from moestro.mixtures.experts.laplace import LaplaceExpert
from moestro.mixtures.experts.noisy import NoisyExpert
from moestro.mixtures.experts.process import GaussianProcessExpert
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
    "bayesian": BayesianExpert,
    "gp": GaussianProcessExpert,
    "svm": lambda: EstimatorExpert(SVR()),
    "elm": lambda: EstimatorExpert(ELMRegressor(20, alpha=0.1)),
}
CLASSIFICATION_EXPERTS: dict[str, Callable[[], Expert]] = {
    "multinomial": MultinomialExpert,
    "logistic": LogisticExpert,
    "constant": ConstantClassExpert,
    "svm": lambda: EstimatorClassExpert(SVC()),
    "elm": lambda: EstimatorClassExpert(ELMClassifier(20, alpha=0.1)),
}

__all__ = [
    "CLASSIFICATION_EXPERTS",
    "REGRESSION_EXPERTS",
    "BayesianExpert",
    "BinomialExpert",
    "ConstantClassExpert",
    "ConstantExpert",
    "EstimatorClassExpert",
    "EstimatorExpert",
    "Expert",
    "GammaExpert",
    "GaussianExpert",
    "GaussianProcessExpert",
    "LaplaceExpert",
    "LogisticExpert",
    "MultinomialExpert",
    "NoisyExpert",
    "PoissonExpert",
    "SkewNormalExpert",
    "SkewTExpert",
    "StudentExpert",
]
