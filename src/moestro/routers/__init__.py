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
    locmoe_slots,
    share_of_tokens,
    slots_by_price,
    slots_in_fours,
    tutel_slots,
)
from moestro.routers.dselect import DSelectK
from moestro.routers.expert_choice import ExpertChoice
from moestro.routers.fixed import HashRouter
from moestro.routers.gates import LearnedTemperature, Standardised, relu, sigmoid, softmax
from moestro.routers.gating_dropout import SkipLayer, StayLocal
from moestro.routers.groupings import GroupSoftmax, OnePerGroup, SampledTail
from moestro.routers.hierarchical import TwoLevelNoisy
from moestro.routers.learned_scorers import (
    AttentionAcrossExperts,
    BlockMeans,
    Cosine,
    GatingResidual,
    GeluNetwork,
    TwoLevels,
)
from moestro.routers.merging import SequenceMerging
from moestro.routers.mixed import BudgetedMix, SoftmaxMix
from moestro.routers.noises import FixedNoise, GaussianNoise, NoNoise, PerDomainNoise
from moestro.routers.scorers import Biased, InputJitter, Linear, Scorer
from moestro.routers.selects import BiasedSelection, GroupLimitedTopK, RandomSecond, TopK
from moestro.routers.soft import SoftSlots
from moestro.routers.straight_through import DenseGradient, SparseMixer
from moestro.routers.token_choice import TokenChoice
from moestro.routers.transports import BalancedAssignment, SinkhornInTraining
from moestro.routers.varying import CloseSecond, Positive, TopP
from moestro.routers.weighs import (
    Normed,
    Renormalised,
    Scaled,
    as_is,
    renormalised_where_several,
    sigmoid_of_selected,
    softmax_over_selected,
)
from moestro.routers.wrapped import WeighsInputs, Wrapped

__all__ = [
    "AttentionAcrossExperts",
    "BalancedAssignment",
    "Biased",
    "BiasedSelection",
    "BlockMeans",
    "BudgetedMix",
    "CloseSecond",
    "Cosine",
    "DSelectK",
    "DenseGradient",
    "DropByPosition",
    "DropByPositionPerExpert",
    "DropByPriority",
    "DropLeastAffine",
    "Dropless",
    "ExpertChoice",
    "FixedNoise",
    "GatingResidual",
    "GaussianNoise",
    "GeluNetwork",
    "GroupLimitedTopK",
    "GroupSoftmax",
    "HashRouter",
    "InTraining",
    "InputJitter",
    "LearnedTemperature",
    "Linear",
    "NoNoise",
    "Normed",
    "OnePerGroup",
    "PerDomainNoise",
    "Positive",
    "RandomSecond",
    "Renormalised",
    "RetryByPosition",
    "Router",
    "SampledTail",
    "Scaled",
    "Scorer",
    "SequenceMerging",
    "SinkhornInTraining",
    "SkipLayer",
    "SoftSlots",
    "SoftmaxMix",
    "SparseMixer",
    "Standardised",
    "StayLocal",
    "TokenChoice",
    "TopK",
    "TopP",
    "TwoLevelNoisy",
    "TwoLevels",
    "WeighsInputs",
    "Wrapped",
    "as_is",
    "gshard_slots",
    "locmoe_slots",
    "relu",
    "renormalised_where_several",
    "share_of_tokens",
    "sigmoid",
    "sigmoid_of_selected",
    "slots_by_price",
    "slots_in_fours",
    "slots_of_choices",
    "softmax",
    "softmax_over_selected",
    "switch_slots",
    "tutel_slots",
]
