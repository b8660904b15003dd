"""Producers of a routing: hidden states in, a Decision out."""

from moestro.routers.base import Router
from moestro.routers.capacities import (
    DropByPosition,
    Dropless,
    InTraining,
    gshard_slots,
    slots_of_choices,
    switch_slots,
)
from moestro.routers.expert_choice import ExpertChoice
from moestro.routers.fixed import HashRouter
from moestro.routers.gates import sigmoid, softmax
from moestro.routers.merging import SequenceMerging
from moestro.routers.noises import GaussianNoise, NoNoise
from moestro.routers.scorers import Biased, InputJitter, Linear, Scorer
from moestro.routers.selects import BiasedSelection, GroupLimitedTopK, RandomSecond, TopK
from moestro.routers.soft import SoftSlots
from moestro.routers.token_choice import TokenChoice
from moestro.routers.weighs import Normed, Renormalised, Scaled, as_is, sigmoid_of_selected, softmax_over_selected
from moestro.routers.wrapped import WeighsInputs, Wrapped

__all__ = [
    "Biased",
    "BiasedSelection",
    "DropByPosition",
    "Dropless",
    "ExpertChoice",
    "GaussianNoise",
    "GroupLimitedTopK",
    "HashRouter",
    "InTraining",
    "InputJitter",
    "Linear",
    "NoNoise",
    "Normed",
    "RandomSecond",
    "Renormalised",
    "Router",
    "Scaled",
    "Scorer",
    "SequenceMerging",
    "SoftSlots",
    "TokenChoice",
    "TopK",
    "WeighsInputs",
    "Wrapped",
    "as_is",
    "gshard_slots",
    "sigmoid",
    "sigmoid_of_selected",
    "slots_of_choices",
    "softmax",
    "softmax_over_selected",
    "switch_slots",
]
