"""Using a trained model: generation and evaluation."""

from moestro.inference.evaluate import Evaluation, evaluate
from moestro.inference.generation import check_generation, generate
from moestro.inference.quantise import quantise_model
from moestro.inference.readers import CachedReader, WholeReader
from moestro.inference.sampler import Sampler

__all__ = [
    "CachedReader",
    "Evaluation",
    "Sampler",
    "WholeReader",
    "check_generation",
    "evaluate",
    "generate",
    "quantise_model",
]
