"""Classical mixtures of experts as scikit-learn estimators. Needs the extra `moestro[sklearn]`, not torch."""

from moestro.mixtures.classifier import MixtureOfExpertsClassifier
from moestro.mixtures.dirichlet import (
    DirichletProcessMixtureOfExpertsClassifier,
    DirichletProcessMixtureOfExpertsRegressor,
)
from moestro.mixtures.elm import ELMClassifier, ELMRegressor
from moestro.mixtures.ensemble import GatedEnsembleClassifier, GatedEnsembleRegressor
from moestro.mixtures.forecasts import ForecastAggregator
from moestro.mixtures.gp import DistributedGPRegressor
from moestro.mixtures.ica import SparseGaussianICA
from moestro.mixtures.online import OnlineMixtureOfExpertsClassifier, OnlineMixtureOfExpertsRegressor
from moestro.mixtures.regressor import MixtureOfExpertsRegressor
from moestro.mixtures.selection import align_experts, select_n_experts

__all__ = [
    "DirichletProcessMixtureOfExpertsClassifier",
    "DirichletProcessMixtureOfExpertsRegressor",
    "DistributedGPRegressor",
    "ELMClassifier",
    "ELMRegressor",
    "ForecastAggregator",
    "GatedEnsembleClassifier",
    "GatedEnsembleRegressor",
    "MixtureOfExpertsClassifier",
    "MixtureOfExpertsRegressor",
    "OnlineMixtureOfExpertsClassifier",
    "OnlineMixtureOfExpertsRegressor",
    "SparseGaussianICA",
    "align_experts",
    "select_n_experts",
]
