"""Using a trained model: generation and evaluation."""

from moestro.inference.evaluate import Evaluation, evaluate
from moestro.inference.generation import check_generation, generate
from moestro.inference.quantise import quantise_model
from moestro.inference.sampler import Sampler

__all__ = ["Evaluation", "Sampler", "check_generation", "evaluate", "generate", "quantise_model"]
