"""Mixtures of experts under Dirichlet processes: the number of experts is inferred by sampling."""

from moestro.mixtures.dirichlet.classifier import DirichletProcessMixtureOfExpertsClassifier
from moestro.mixtures.dirichlet.regressor import DirichletProcessMixtureOfExpertsRegressor

__all__ = ["DirichletProcessMixtureOfExpertsClassifier", "DirichletProcessMixtureOfExpertsRegressor"]
