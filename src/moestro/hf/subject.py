"""A model folder opened for looking at: its routing on a text, its experts' weights and answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.balance import RoutingLog
from moestro.hf.doctor import model_without_weights
from moestro.hf.families import FoundLayer, find_layers
from moestro.hf.layouts import FAMILIES, StockFolder, find_banks
from moestro.hf.watch import watch
from moestro.layers import MoE
from moestro.models import DecoderLM, load_model
from moestro.routing import Decision

PROBES = 64
"""Tokens of the text that every expert of a layer answers."""
MOST_COLUMNS = 1 << 20
"""Weights of an expert's tensor that are compared; of larger ones, evenly spaced ones."""
ROOM = 1.25  # times the weights' bytes that must be free


class Subject(ABC):
    """A model whose routers are watched.

    Args:
        model: in evaluation mode.
        blocks: by name, the modules whose input the experts get.

    Attributes:
        model: as given.
        layers: names of the mixture layers in model order.
        max_length: most tokens in a sequence, or None.
        vocab_size: token ids that it knows.
    """

    max_length: int | None
    vocab_size: int

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]):
        self.model, self.layers = model, list(blocks)
        self._inputs: dict[str, Tensor] = {}
        self._counted = torch.zeros(0, dtype=torch.bool)
        for name, block in blocks.items():
            block.register_forward_pre_hook(self._keep(name), with_kwargs=True)

    @torch.inference_mode()
    def route(self, tokens: Tensor, valid: Tensor, counted: Tensor) -> dict[str, list[Decision]]:
        """Run the model and say what its routers decided, by layer.

        Args:
            tokens: `[batch, length]`.
            valid: False for padding, of the same shape.
            counted: tokens that statistics shall count, of the same shape.
        """
        self._counted = counted.flatten()
        decisions = self._run(tokens, valid)
        return {name: [_counting(each, self._counted) for each in of] for name, of in decisions.items()}

    @abstractmethod
    def _run(self, tokens: Tensor, valid: Tensor) -> Mapping[str, list[Decision]]:
        """Run the model; its decisions by layer."""

    @abstractmethod
    def weights(self, layer: str) -> Iterator[Tensor]:
        """The matrices of a layer's experts, one tensor `[experts, ...]` after another; none where they differ."""

    @abstractmethod
    def answers(self, layer: str) -> Tensor:
        """What every expert of a layer makes of the same tokens of the text, `[experts, tokens, width]`."""

    def facts(self) -> dict[str, Any]:
        """What is inspected, in plain values."""
        config: Any = self.model.config
        kind = "moestro" if isinstance(config, dict) else config.model_type
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {
            "model_type": kind,
            "architecture": type(self.model).__name__,
            "dtype": dtype,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name not in self._inputs:
                x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                x = x.detach().flatten(0, -2)[self._counted]
                self._inputs[name] = x[:: max(len(x) // PROBES, 1)][:PROBES].clone()

        return hook


class StockSubject(Subject):
    """A model of transformers."""

    def __init__(self, model: Any):
        self._found = find_layers(model)
        super().__init__(model, {name: layer.block for name, layer in self._found.items()})
        config = model.config.get_text_config()
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self._log = watch(model)

    def _run(self, tokens: Tensor, valid: Tensor) -> Mapping[str, list[Decision]]:
        given = {"input_ids": tokens, "attention_mask": valid.long()}
        if self.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            given |= {"decoder_input_ids": tokens, "decoder_attention_mask": valid.long()}
        with self._log.recording():
            self.model(**given)
        return self._log.decisions

    def weights(self, layer: str) -> Iterator[Tensor]:
        found = self._found[layer]
        if isinstance(found.experts, nn.ModuleDict):
            experts = _members(found)
            for name in dict(experts[0].named_parameters()):
                yield torch.stack([_thin(expert.get_parameter(name).unsqueeze(0))[0] for expert in experts])
        else:
            yield from _stacked(found.experts, getattr(found.experts, "num_routed_experts", found.num_experts))

    @torch.inference_mode()
    def answers(self, layer: str) -> Tensor:
        return run_every_expert(self._found[layer], self._inputs[layer])


class OwnSubject(Subject):
    """A model of moestro's own layers."""

    def __init__(self, model: DecoderLM):
        self._moes = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        super().__init__(model, self._moes)
        self.max_length, self.vocab_size = model.max_length, model.vocab_size
        self._log = RoutingLog(model)

    def _run(self, tokens: Tensor, valid: Tensor) -> Mapping[str, list[Decision]]:
        with self._log.recording():
            self.model(tokens, None if bool(valid.all()) else valid)
        return self._log.decisions

    def weights(self, layer: str) -> Iterator[Tensor]:
        experts = self._moes[layer].experts
        yield from _stacked(experts, experts.num_experts)

    @torch.inference_mode()
    def answers(self, layer: str) -> Tensor:
        x, experts = self._inputs[layer], self._moes[layer].experts
        offsets = torch.arange(experts.num_experts + 1) * len(x)
        return experts(x.repeat(experts.num_experts, 1), offsets).view(experts.num_experts, len(x), -1)


def open_subject(folder: str | Path) -> Subject:
    """Open a folder of transformers, or one that moestro saved, on the CPU.

    Raises:
        ValueError: pickles, code, a cut file, a tensor that is missing or mis-shaped, a dense or unknown model, or
            one larger than the free memory.
    """
    path = Path(folder)
    with StockFolder(path) as stock:  # refuses what is not safe or not whole
        needed = sum(entry.nbytes for entry in stock.tensors.values())
        own = stock.model_type == "moestro"
        if stock.model_type in FAMILIES:
            find_banks(stock, FAMILIES[stock.model_type])  # says which expert is missing
    free = free_memory()
    if free is not None and needed * ROOM > free:
        raise ValueError(
            f"{path} holds {needed / 2**30:.1f} GiB of weights but {free / 2**30:.1f} GiB of memory are free; "
            "inspect it on a larger machine"
        )
    if own:
        return OwnSubject(load_model(path).eval())
    import transformers

    find_layers(model_without_weights(path))  # a dense or unknown model is refused before its weights are read
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    safely = {"local_files_only": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    with _quietly():  # what it would print is said below, or is no matter of the reader's
        model, info = kind.from_pretrained(path, dtype="auto", output_loading_info=True, **safely)
    missing = sorted(info["missing_keys"])
    misfit = sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}; its weights are not complete")
    if misfit:
        raise ValueError(f"{path} holds {misfit[0]} in another shape than config.json describes")
    return StockSubject(model.eval())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the reports of transformers about what it loads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def run_every_expert(layer: FoundLayer, x: Tensor) -> Tensor:
    """What every expert of a layer answers, with weight 1, `[tokens, width]` -> `[experts, tokens, width]`."""
    experts, count = layer.experts, layer.num_experts
    if isinstance(experts, nn.ModuleDict):
        return torch.stack([expert(x) for expert in _members(layer)])
    if layer.family.output.scale == "input":  # a plain bank: rows in equal shares
        return experts(x.repeat(count, 1)).view(count, len(x), -1)
    index = torch.zeros(len(x), 2, dtype=torch.long)  # twice the same: one family cannot run top-1
    weight = torch.tensor([1.0, 0.0], dtype=x.dtype).expand(len(x), 2)
    return torch.stack([experts(x, index + expert, weight) for expert in range(count)])


def free_memory() -> int | None:
    """Bytes of memory that a program can still take, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _members(layer: FoundLayer) -> list[nn.Module]:
    """Experts that are modules of their own."""
    return [layer.experts[f"expert_{expert}"] for expert in range(layer.num_experts)]


def _counting(decision: Decision, counted: Tensor) -> Decision:
    """The decision with other tokens left out of statistics."""
    return replace(decision, notes={**decision.notes, "valid": counted})


def _stacked(experts: nn.Module, count: int) -> Iterator[Tensor]:
    """The matrices that a bank keeps in one tensor `[experts, ...]`; some hold unused ones at the end."""
    for parameter in experts.parameters():
        if parameter.dim() >= 3 and len(parameter) >= count:
            yield _thin(parameter[:count])


def _thin(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten(1)
    return flat[:, :: max(flat.shape[1] // MOST_COLUMNS, 1)]
