"""Consumers of a routing: rows grouped by expert in, rows out."""

from moestro.experts.activations import ACTIVATIONS, is_gated
from moestro.experts.affine import AffineExperts
from moestro.experts.bank import make_experts
from moestro.experts.base import Experts
from moestro.experts.concat import ConcatExperts
from moestro.experts.glu import GLU
from moestro.experts.mlp import MLP
from moestro.experts.modules import ModuleExperts
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
    "ZeroExperts",
    "is_gated",
    "make_experts",
]
