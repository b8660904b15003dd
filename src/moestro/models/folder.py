"""A language model as a Hugging Face folder: config.json, generation_config.json, model.safetensors, tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.models.build import build_language_model
from moestro.models.decoder import DecoderLM
from moestro.models.layouts import LAYOUTS, Choice, choose_layout, to_ours, to_theirs
from moestro.models.quantised import make_room, quantised_parts
from moestro.models.staging import write_folder
from moestro.models.unwritten import unwritten_parameters

FORMAT = 1  # of the "moestro" entry of config.json


class SavesItself(Protocol):
    """What a tokenizer must offer to be saved beside a model."""

    eos_id: int | None

    def save(self, folder: str | Path) -> None: ...


@dataclass(frozen=True)
class SavedModel:
    """Where a model went and in which layout.

    Attributes:
        folder: the folder.
        layout: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, Llama, Qwen3, or moestro = our own.
        reason: why that layout, in words.
        stock: whether stock transformers opens the folder.
    """

    folder: Path
    layout: str
    reason: str
    stock: bool


def save_model(model: DecoderLM, folder: str | Path, tokenizer: SavesItself | None = None) -> SavedModel:
    """Write a model so that `load_model`, and stock transformers if the architecture is a stock one, open it.

    The layout is a released one if it computes exactly this model, else our own. The folder appears whole or
    not at all; a model that is there already is replaced.

    Raises:
        ValueError: the folder exists and holds something else than a model.
    """
    choice = choose_layout(model)
    eos = None if tokenizer is None else tokenizer.eos_id
    tensors = to_theirs(choice.layout.rules(model), _cpu_state(model))
    with write_folder(Path(folder)) as staging:
        write_settings(staging, model, choice, eos)
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(staging)
    return SavedModel(Path(folder), choice.layout.name, choice.reason, choice.layout.architecture is not None)


def load_model(folder: str | Path) -> DecoderLM:
    """The model of a folder that `save_model` wrote, in evaluation mode, on the CPU.

    Raises:
        ValueError: no such folder, not one of ours, or its parts do not belong together.
    """
    folder = Path(folder)
    config = _read_config(folder)
    with unwritten_parameters():
        model = build_language_model(**config["moestro"]["arguments"])
    make_room(model, config["moestro"].get("quantised", {}))
    tensors = _read_tensors(folder / "model.safetensors")
    state = to_ours(LAYOUTS[config["model_type"]].rules(model), tensors)
    model.to(getattr(torch, config["dtype"]))
    if "head.weight" in model.state_dict() and model.config["tied_embeddings"]:
        state["head.weight"] = state["embedding.weight"]
    _check_shapes(model, state)
    model.load_state_dict(state)
    return model.eval()


def _cpu_state(model: DecoderLM) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def write_settings(folder: Path, model: DecoderLM, choice: Choice, eos: int | None) -> None:
    """Write config.json and generation_config.json; the model may live on the meta device."""
    _write_json(folder / "config.json", model_config(model, choice, eos))
    _write_json(folder / "generation_config.json", {"do_sample": False} | _special_tokens(eos))


def model_config(model: DecoderLM, choice: Choice, eos: int | None = None) -> dict[str, Any]:
    """config.json of a model in a layout.

    Args:
        model: may live on the meta device.
        choice: the layout and why it was chosen.
        eos: the token that ends a document.
    """
    layout = choice.layout
    ours = {"format": FORMAT, "layout": layout.name, "reason": choice.reason, "arguments": model.config}
    quantised = quantised_parts(model)
    ours |= {"quantised": quantised} if quantised else {}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    return {
        "architectures": [layout.architecture or "MoestroForCausalLM"],
        "model_type": layout.model_type,
        "dtype": dtype,
        **_special_tokens(eos),
        **layout.config(model),
        "moestro": ours,
    }


def _special_tokens(eos: int | None) -> dict[str, int | None]:
    """Said explicitly: the stock defaults would end a text of bytes at byte 2."""
    return {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json; pass a folder that save_model wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore the file") from None
    ours = config.get("moestro") if isinstance(config, dict) else None
    if not isinstance(ours, dict) or config.get("model_type") not in LAYOUTS:
        raise ValueError(f"{path} was not written by moestro; load_model reads folders that save_model wrote")
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {ours.get('format')} but this moestro reads format {FORMAT}; update moestro"
        )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; restore the file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); restore the file") from None


def _check_shapes(model: DecoderLM, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)} in the file but config.json describes "
                f"{list(tensor.shape)}; the two do not belong together"
            )
