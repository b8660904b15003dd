"""A whole language model in 8 or 4 bits: experts, attention and head, with the error of every tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from moestro.experts import (
    GLU,
    MLP,
    FeedForward,
    TensorError,
    quantise,
    quantise_feed_forward,
    quantise_linear,
)
from moestro.models import DecoderLM
from moestro.models.quantised import quantised_parts

KEPT = ("*norm.weight", "*.router.*", "embedding.weight", "*.shared.weight")


def quantise_model(
    model: DecoderLM, bits: int = 8, group: int = 64, keep: Collection[str] = KEPT
) -> list[TensorError]:
    """Quantise a language model in place, for inference: every bank of experts, dense network and linear map.

    Tied embeddings are untied: the table stays as it is, the head gets codes of its own.

    Args:
        model: the language model; use it under `torch.inference_mode()` afterwards.
        bits: 8 or 4.
        group: inputs that share a scale in 4 bits.
        keep: patterns of the parameters that stay as they are; by default norms, routers, gates of shared
            experts and the embedding.

    Returns: every quantised tensor with its bits and its error; printing them gives a table.

    Raises:
        ValueError: bits or group out of range, or a parameter that can neither be quantised nor is named in `keep`;
            nothing is changed then.
    """
    if quantised_parts(model):
        raise ValueError("the model is quantised already, and its codes would lose more; quantise the float model")
    parts = list(_quantisable(model, keep))
    if not parts:
        raise ValueError(f"keep={list(keep)} leaves nothing to quantise; name fewer tensors")
    _refuse_skipped(model, [name for name, _ in parts], keep)
    errors: list[TensorError] = []
    for name, module in parts:
        new, found = _quantised(module, bits, group)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        errors += [replace(error, name=f"{name}.{error.name}") for error in found]
    return errors


def _quantised(module: nn.Module, bits: int, group: int) -> tuple[nn.Module, list[TensorError]]:
    if isinstance(module, nn.Linear):
        linear, error = quantise_linear(module, bits, group)
        return linear, [error]
    if isinstance(module, FeedForward):
        return quantise_feed_forward(module, bits, group)
    assert isinstance(module, GLU | MLP)
    return quantise(module, bits, group)


def _quantisable(model: DecoderLM, keep: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | GLU | MLP | FeedForward):
            tensors = [f"{name}.{each}" for each, _ in module.named_parameters()]
            if not all(_is_kept(each, keep) for each in tensors):
                yield name, module


def _refuse_skipped(model: DecoderLM, parts: Collection[str], keep: Collection[str]) -> None:
    skipped = [
        name
        for name, _ in _own_parameters(model)
        if not _is_kept(name, keep) and not any(name.startswith(f"{part}.") for part in parts)
    ]
    if skipped:
        raise ValueError(
            f"{len(skipped)} tensors would stay in float: {', '.join(skipped[:5])}{' ...' * (len(skipped) > 5)}; "
            "name them in keep if that is what you want"
        )


def _own_parameters(model: DecoderLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)


def _is_kept(name: str, keep: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in keep)
