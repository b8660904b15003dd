"""Which tokens of a call to a transformers model are real, and to which sequence each belongs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CallTokens:
    """Facts about the tokens of one call of a model, or of its encoder or decoder.

    Attributes:
        valid: False for padding, `[tokens]` bool; None = all valid.
        sequence: which sequence each token belongs to, `[tokens]` int64; None = unknown.
        ids: vocabulary index, `[tokens]` int64; None = the call had embeddings.
    """

    valid: Tensor | None = None
    sequence: Tensor | None = None
    ids: Tensor | None = None


class CallReader:
    """Reads the arguments of every call of a model, from outside.

    A token is padding if the attention mask says so: where a 2-D mask `[batch, keys]` is 0, or where a 4-D mask
    `[batch, heads or 1, queries, keys]`, boolean or added to scores, hides a token from itself. Sequences are the
    rows of the batch, parted where `position_ids` start again (packing).

    Args:
        model: what the user calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        self.override: Tensor | None = None
        self.gradient = True
        self._sides: dict[str, CallTokens] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def of_layer(self, name: str) -> CallTokens:
        """The tokens that a layer sees: the decoder's or the encoder's where a model has both."""
        side = "decoder" if "decoder" in name.split(".") else "encoder" if "encoder" in name.split(".") else ""
        return self._sides.get(side, self._sides.get("", CallTokens()))

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**self._signature.bind_partial(*args).arguments, **kwargs}
        self.gradient = torch.is_grad_enabled()
        main = tokens_of_call(given)
        if self.override is not None:
            main = replace(main, valid=self.override.bool().flatten())
        self._sides = {"": main}
        if given.get("decoder_input_ids") is not None or getattr(model.config, "is_encoder_decoder", False):
            self._sides = {"": main, "encoder": main, "decoder": _tokens_of_decoder(given)}

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        self._sides = {}


def _tokens_of_decoder(given: Mapping[str, Any]) -> CallTokens:
    """Of an encoder-decoder's decoder; where it gets labels alone, the label -100 marks padding."""
    ids, mask, labels = (given.get(name) for name in ("decoder_input_ids", "decoder_attention_mask", "labels"))
    if ids is None and labels is not None:
        tokens = tokens_of_call({"input_ids": labels, "attention_mask": labels != -100 if mask is None else mask})
        return replace(tokens, ids=None)
    return tokens_of_call({"input_ids": ids, "attention_mask": mask})


def tokens_of_call(given: Mapping[str, Any]) -> CallTokens:
    """Read the usual arguments: input_ids or inputs_embeds, attention_mask, position_ids."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    shown = ids if ids is not None else embeds
    mask = given.get("attention_mask")
    if isinstance(mask, Mapping):  # one mask per kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if shown is None:
        return CallTokens(None if mask is None or mask.dim() != 2 else mask.bool().flatten())
    batch, length = shown.shape[:2]
    valid = None if mask is None else valid_of_mask(mask, length)
    row = torch.arange(batch, device=shown.device).unsqueeze(1).expand(batch, length)
    positions = given.get("position_ids")
    if positions is not None and positions.dim() == 2:
        starts = (positions == 0).long().expand(batch, length).cumsum(1)
        row = row * (length + 1) + starts
    return CallTokens(valid, row.flatten(), None if ids is None else ids.flatten())


def valid_of_mask(mask: Tensor, length: int) -> Tensor:
    """Tokens that are not padding, `[batch * length]` bool, from a 2-D or 4-D attention mask.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask.dim() == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].bool().flatten()
    if mask.dim() == 4 and mask.shape[2] >= length and mask.shape[3] >= length:
        if mask.is_floating_point():
            seen = mask > torch.finfo(mask.dtype).min / 2
        else:
            seen = mask.bool()
        own = seen[:, 0, mask.shape[2] - length :, mask.shape[3] - length :].diagonal(dim1=1, dim2=2)
        return own.flatten()
    raise ValueError(
        f"an attention mask of shape {list(mask.shape)} does not say which of {length} tokens per sequence are "
        "padding; pass recording(valid=...) with one bool per token, [batch, length]"
    )


def recomputing() -> bool:
    """Whether autograd runs backward here: activation checkpointing calls layers again then."""
    return bool(torch._C._current_graph_task_id() != -1)
