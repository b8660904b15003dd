"""Reference models that take any mixture of experts."""

from moestro.models.attention import GroupedQueryAttention
from moestro.models.build import build_language_model
from moestro.models.cache import KeyValueCache
from moestro.models.counts import ModelCounts
from moestro.models.decoder import Block, DecoderLM
from moestro.models.folder import SavedModel, load_model, save_model
from moestro.models.latent import LatentAttention
from moestro.models.layouts import choose_layout
from moestro.models.plan import Plan, plan
from moestro.models.twin import build_dense_twin, dense_twin_hidden

__all__ = [
    "Block",
    "DecoderLM",
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentAttention",
    "ModelCounts",
    "Plan",
    "SavedModel",
    "build_dense_twin",
    "build_language_model",
    "choose_layout",
    "dense_twin_hidden",
    "load_model",
    "plan",
    "save_model",
]
