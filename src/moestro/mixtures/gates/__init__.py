"""Gates: how likely each expert is for an input."""

from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.gates.constant import ConstantGate
from moestro.mixtures.gates.gaussian import GaussianGate
from moestro.mixtures.gates.softmax import SoftmaxGate

GATES: dict[str, type[Gate]] = {"softmax": SoftmaxGate, "gaussian": GaussianGate, "constant": ConstantGate}

__all__ = ["GATES", "ConstantGate", "Effort", "Gate", "GaussianGate", "Params", "SoftmaxGate"]
