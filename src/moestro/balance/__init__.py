"""What keeps experts busy: losses, controllers and the log they read; never runs inside forward."""

from moestro.balance.adaptive import AdaptiveLoss, AdaptiveSparsity, FollowDrops
from moestro.balance.controllers import Controller, LossFreeBias
from moestro.balance.levels import CommunicationBalance, GlobalBatchBalance, GroupBalance
from moestro.balance.log import RoutingLog
from moestro.balance.loss import Loss, PerSequence, TokenLoss, TokenMean
from moestro.balance.losses import (
    LoadTimesProbability,
    SequenceBalance,
    UnbiasedBalance,
    cv_squared,
    importance_cv_squared,
    load_cv_squared,
    load_times_probability,
    z_loss,
)
from moestro.balance.quantile import QuantileBias
from moestro.balance.selectors import selector_entropy
from moestro.balance.smooth import noted_load_cv_squared, softmax_importance_cv_squared, threshold_load_cv_squared
from moestro.balance.sparsity import AtTemperature, DearExperts, LoadWeightedL1, router_entropy
from moestro.balance.special import (
    GateBudget,
    Locality,
    PlaceBalance,
    TaskInformation,
    single_choice_balance,
)
from moestro.balance.totals import StepTotals, Term, terms_of

__all__ = [
    "AdaptiveLoss",
    "AdaptiveSparsity",
    "AtTemperature",
    "CommunicationBalance",
    "Controller",
    "DearExperts",
    "FollowDrops",
    "GateBudget",
    "GlobalBatchBalance",
    "GroupBalance",
    "LoadTimesProbability",
    "LoadWeightedL1",
    "Locality",
    "Loss",
    "LossFreeBias",
    "PerSequence",
    "PlaceBalance",
    "QuantileBias",
    "RoutingLog",
    "SequenceBalance",
    "StepTotals",
    "TaskInformation",
    "Term",
    "TokenLoss",
    "TokenMean",
    "UnbiasedBalance",
    "cv_squared",
    "importance_cv_squared",
    "load_cv_squared",
    "load_times_probability",
    "noted_load_cv_squared",
    "router_entropy",
    "selector_entropy",
    "single_choice_balance",
    "softmax_importance_cv_squared",
    "terms_of",
    "threshold_load_cv_squared",
    "z_loss",
]
