"""Consumers of a routing: rows grouped by expert in, rows out."""

from moestro.experts.activations import ACTIVATIONS, is_gated
from moestro.experts.affine import AffineExperts
from moestro.experts.bank import make_experts
from moestro.experts.base import Experts
from moestro.experts.chosen import run_chosen
from moestro.experts.concat import ConcatExperts
from moestro.experts.device import is_planned_on_device
from moestro.experts.fused import accumulate_in_place, all_kernels, is_fused
from moestro.experts.glu import GLU
from moestro.experts.mlp import MLP
from moestro.experts.modules import ModuleExperts
from moestro.experts.quantised import QuantisedExperts, quantise
from moestro.experts.quantised_maps import (
    QuantisedFeedForward,
    QuantisedLinear,
    quantise_feed_forward,
    quantise_linear,
)
from moestro.experts.quantised_stack import QuantisedStack, TensorError
from moestro.experts.single import FeedForward, GatedFeedForward
from moestro.experts.trivial import ConstantExperts, CopyExperts, ZeroExperts

__all__ = [
    "ACTIVATIONS",
    "GLU",
    "MLP",
    "AffineExperts",
    "ConcatExperts",
    "ConstantExperts",
    "CopyExperts",
    "Experts",
    "FeedForward",
    "GatedFeedForward",
    "ModuleExperts",
    "QuantisedExperts",
    "QuantisedFeedForward",
    "QuantisedLinear",
    "QuantisedStack",
    "TensorError",
    "ZeroExperts",
    "accumulate_in_place",
    "all_kernels",
    "is_fused",
    "is_gated",
    "is_planned_on_device",
    "make_experts",
    "quantise",
    "quantise_feed_forward",
    "quantise_linear",
    "run_chosen",
]
