"""Gates: how likely each expert is for an input."""

from collections.abc import Callable
from functools import partial

from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.gates.constant import ConstantGate
from moestro.mixtures.gates.exponential import ExponentialFamilyGate
from moestro.mixtures.gates.gaussian import GaussianGate
from moestro.mixtures.gates.kernel import KernelGate
from moestro.mixtures.gates.softmax import SoftmaxGate

GATES: dict[str, Callable[[], Gate]] = {
    "softmax": SoftmaxGate,
    "gaussian": GaussianGate,
    "constant": ConstantGate,
    "exponential-family": ExponentialFamilyGate,
    "kernel": KernelGate,
    "reconstruction": partial(GaussianGate, covariance="rank-1"),
}

__all__ = [
    "GATES",
    "ConstantGate",
    "Effort",
    "ExponentialFamilyGate",
    "Gate",
    "GaussianGate",
    "KernelGate",
    "Params",
    "SoftmaxGate",
]
