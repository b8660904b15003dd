"""Classical mixtures of experts as scikit-learn estimators. Needs the extra `moestro[sklearn]`, not torch."""

from moestro.mixtures.classifier import MixtureOfExpertsClassifier
from moestro.mixtures.regressor import MixtureOfExpertsRegressor

__all__ = ["MixtureOfExpertsClassifier", "MixtureOfExpertsRegressor"]
