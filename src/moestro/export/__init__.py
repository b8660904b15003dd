"""Models as graphs of static shapes, for `torch.export`, ONNX and what runs them."""

from moestro.export.dense import DenseRun, every_expert
from moestro.export.form import for_export, to_program
from moestro.export.onnx import to_onnx

__all__ = ["DenseRun", "every_expert", "for_export", "to_onnx", "to_program"]
