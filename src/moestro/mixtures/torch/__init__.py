"""The mixtures that need gradients, and the way from a fitted mixture to a layer and back. Needs torch."""

from moestro.mixtures.torch.deep import DeepMixtureOfExperts
from moestro.mixtures.torch.expert_gate import AddedTask, ExpertGate, TaskNetwork
from moestro.mixtures.torch.layer import to_moe
from moestro.mixtures.torch.mcgsm import MCGSM
from moestro.mixtures.torch.read import from_moe
from moestro.mixtures.torch.softmaxes import MixtureOfSoftmaxes
from moestro.mixtures.torch.spatial import RecurrentImageDensity, SpatialLSTM, causal_neighbourhood, dequantise

__all__ = [
    "MCGSM",
    "AddedTask",
    "DeepMixtureOfExperts",
    "ExpertGate",
    "MixtureOfSoftmaxes",
    "RecurrentImageDensity",
    "SpatialLSTM",
    "TaskNetwork",
    "causal_neighbourhood",
    "dequantise",
    "from_moe",
    "to_moe",
]
