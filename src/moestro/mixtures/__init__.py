"""Classical mixtures of experts as scikit-learn estimators. Needs the extra `moestro[sklearn]`, not torch."""

from moestro.mixtures.classifier import MixtureOfExpertsClassifier
from moestro.mixtures.ensemble import GatedEnsembleClassifier, GatedEnsembleRegressor
from moestro.mixtures.gp import DistributedGPRegressor
from moestro.mixtures.online import OnlineMixtureOfExpertsRegressor
from moestro.mixtures.regressor import MixtureOfExpertsRegressor
from moestro.mixtures.selection import align_experts, select_n_experts

__all__ = [
    "DistributedGPRegressor",
    "GatedEnsembleClassifier",
    "GatedEnsembleRegressor",
    "MixtureOfExpertsClassifier",
    "MixtureOfExpertsRegressor",
    "OnlineMixtureOfExpertsRegressor",
    "align_experts",
    "select_n_experts",
]
