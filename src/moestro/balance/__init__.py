"""What keeps experts busy: losses, controllers and the log they read; never runs inside forward."""

from moestro.balance.controllers import Controller, LossFreeBias
from moestro.balance.levels import CommunicationBalance, GlobalBatchBalance, GroupBalance
from moestro.balance.log import RoutingLog
from moestro.balance.losses import (
    LoadTimesProbability,
    SequenceBalance,
    cv_squared,
    importance_cv_squared,
    load_cv_squared,
    load_times_probability,
    z_loss,
)

__all__ = [
    "CommunicationBalance",
    "Controller",
    "GlobalBatchBalance",
    "GroupBalance",
    "LoadTimesProbability",
    "LossFreeBias",
    "RoutingLog",
    "SequenceBalance",
    "cv_squared",
    "importance_cv_squared",
    "load_cv_squared",
    "load_times_probability",
    "z_loss",
]
