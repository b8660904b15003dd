"""Layers and language models as ONNX files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.export.form import named_inputs, to_program

LARGEST_FILE = 2**31 - 2**20  # protobuf ends at 2 GiB


def to_onnx(model: nn.Module, path: str | os.PathLike[str], example: Tensor | Mapping[str, Tensor]) -> Path:
    """Write a layer or language model as an ONNX file that serves any number of tokens and any routing.

    Inputs carry the names of the example, the output is `y` (a layer) or `logits` (a language model).

    Args:
        model: a `MoE` or a `DecoderLM`; left alone.
        path: of the file, which appears whole or not at all.
        example: inputs of the right kinds, see `to_program`.

    Returns: the path.

    Raises:
        ValueError: as `to_program`; packages that are not installed; a model above 2 GiB.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX files need two packages more: pip install 'moestro[export]'") from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB of weights but an ONNX file holds 2; use to_program"
        )
    names = tuple(named_inputs(model, example))
    output = "y" if names[0] == "x" else "logits"
    program = to_program(model, example)
    try:
        written = torch.onnx.export(
            program,
            input_names=list(names),
            output_names=[output],
            dynamo=True,
            verbose=False,
            custom_translation_table=_stable_sorts(),
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"ONNX has no form of an operation of this model ({reason}); to_program still gives its graph"
        ) from error
    assert written is not None
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        written.save(partial, external_data=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _stable_sorts() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Stable sorts as ONNX's TopK of everything, whose ties go to the lowest index."""
    from onnxscript import opset18 as op

    def sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        size = op.Shape(x, start=dim, end=None if dim == -1 else dim + 1)
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    def argsort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        return sort(x, stable, dim, descending)[1]

    return {torch.ops.aten.sort.stable: sort, torch.ops.aten.argsort.stable: argsort}
