"""The bridge to transformers: `import moestro.hf` registers our experts back end and the model type `moestro`."""

from moestro.hf.auto import MoestroConfig, MoestroForCausalLM, register_auto_classes
from moestro.hf.bias import exact_bias
from moestro.hf.counts import StockCounts, count_config
from moestro.hf.doctor import Finding, diagnose, diagnose_folder
from moestro.hf.experts import BACKEND, experts_forward, register_backend, use_experts
from moestro.hf.families import FoundLayer, all_families, find_layers
from moestro.hf.loading import load, save_pretrained
from moestro.hf.mends import protect_inputs, revive_routers
from moestro.hf.replay import replay
from moestro.hf.traces import Trace, load_trace
from moestro.hf.trainer import BalancedTrainer
from moestro.hf.watch import TransformersLog, convert_coefficient, watch

register_backend()
register_auto_classes()

__all__ = [
    "BACKEND",
    "BalancedTrainer",
    "Finding",
    "FoundLayer",
    "MoestroConfig",
    "MoestroForCausalLM",
    "StockCounts",
    "Trace",
    "TransformersLog",
    "all_families",
    "convert_coefficient",
    "count_config",
    "diagnose",
    "diagnose_folder",
    "exact_bias",
    "experts_forward",
    "find_layers",
    "load",
    "load_trace",
    "protect_inputs",
    "register_auto_classes",
    "register_backend",
    "replay",
    "revive_routers",
    "save_pretrained",
    "use_experts",
    "watch",
]
