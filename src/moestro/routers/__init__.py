"""Producers of a routing: hidden states in, a Decision out."""

from moestro.routers.base import Router
from moestro.routers.capacities import DropByPosition, Dropless, gshard_slots, switch_slots
from moestro.routers.expert_choice import ExpertChoice
from moestro.routers.fixed import HashRouter
from moestro.routers.gates import sigmoid, softmax
from moestro.routers.merging import SequenceMerging
from moestro.routers.noises import GaussianNoise, NoNoise
from moestro.routers.scorers import InputJitter, Linear, Scorer
from moestro.routers.selects import BiasedSelection, GroupLimitedTopK, RandomSecond, TopK
from moestro.routers.soft import SoftSlots
from moestro.routers.token_choice import TokenChoice
from moestro.routers.weighs import Renormalised, as_is, softmax_over_selected

__all__ = [
    "BiasedSelection",
    "DropByPosition",
    "Dropless",
    "ExpertChoice",
    "GaussianNoise",
    "GroupLimitedTopK",
    "HashRouter",
    "InputJitter",
    "Linear",
    "NoNoise",
    "RandomSecond",
    "Renormalised",
    "Router",
    "Scorer",
    "SequenceMerging",
    "SoftSlots",
    "TokenChoice",
    "TopK",
    "as_is",
    "gshard_slots",
    "sigmoid",
    "softmax",
    "softmax_over_selected",
    "switch_slots",
]
