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
from moestro.routers.drops import (
    DropByPositionPerExpert,
    DropByPriority,
    DropLeastAffine,
    RetryByPosition,
    slots_by_price,
    slots_in_fours,
)
from moestro.routers.dselect import DSelectK
from moestro.routers.expert_choice import ExpertChoice
from moestro.routers.fixed import HashRouter
from moestro.routers.gates import LearnedTemperature, relu, sigmoid, softmax
from moestro.routers.learned_scorers import (
    AttentionAcrossExperts,
    BlockMeans,
    Cosine,
    GatingResidual,
    PerTask,
    TwoLayer,
    TwoLevels,
)
from moestro.routers.merging import SequenceMerging
from moestro.routers.noises import FixedNoise, GaussianNoise, NoNoise
from moestro.routers.scorers import Biased, InputJitter, Linear, Scorer
from moestro.routers.selects import BiasedSelection, GroupLimitedTopK, RandomSecond, TopK
from moestro.routers.soft import SoftSlots
from moestro.routers.token_choice import TokenChoice
from moestro.routers.transports import BalancedAssignment, SinkhornInTraining
from moestro.routers.varying import CloseSecond, Positive, TopP
from moestro.routers.weighs import Normed, Renormalised, Scaled, as_is, sigmoid_of_selected, softmax_over_selected
from moestro.routers.wrapped import WeighsInputs, Wrapped

__all__ = [
    "AttentionAcrossExperts",
    "BalancedAssignment",
    "Biased",
    "BiasedSelection",
    "BlockMeans",
    "CloseSecond",
    "Cosine",
    "DSelectK",
    "DropByPosition",
    "DropByPositionPerExpert",
    "DropByPriority",
    "DropLeastAffine",
    "Dropless",
    "ExpertChoice",
    "FixedNoise",
    "GatingResidual",
    "GaussianNoise",
    "GroupLimitedTopK",
    "HashRouter",
    "InTraining",
    "InputJitter",
    "LearnedTemperature",
    "Linear",
    "NoNoise",
    "Normed",
    "PerTask",
    "Positive",
    "RandomSecond",
    "Renormalised",
    "RetryByPosition",
    "Router",
    "Scaled",
    "Scorer",
    "SequenceMerging",
    "SinkhornInTraining",
    "SoftSlots",
    "TokenChoice",
    "TopK",
    "TopP",
    "TwoLayer",
    "TwoLevels",
    "WeighsInputs",
    "Wrapped",
    "as_is",
    "gshard_slots",
    "relu",
    "sigmoid",
    "sigmoid_of_selected",
    "slots_by_price",
    "slots_in_fours",
    "slots_of_choices",
    "softmax",
    "softmax_over_selected",
    "switch_slots",
]
