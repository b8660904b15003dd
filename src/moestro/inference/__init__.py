"""Using a trained model: generation and evaluation."""

from moestro.inference.choose_steps import choose_steps, compile_steps
from moestro.inference.decoding import plan_decoding
from moestro.inference.evaluate import Evaluation, evaluate
from moestro.inference.generation import check_generation, generate
from moestro.inference.quantise import quantise_model
from moestro.inference.readers import CachedReader, WholeReader
from moestro.inference.sampler import Sampler
from moestro.inference.single_row import lay_out_for_decoding

__all__ = [
    "CachedReader",
    "Evaluation",
    "Sampler",
    "WholeReader",
    "check_generation",
    "choose_steps",
    "compile_steps",
    "evaluate",
    "generate",
    "lay_out_for_decoding",
    "plan_decoding",
    "quantise_model",
]
