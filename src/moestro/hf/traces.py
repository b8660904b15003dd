"""Routing traces: which experts every token chose in every layer, small enough to keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moestro.hf.families import FoundLayer, find_layers
from moestro.models.staging import write_folder

FORMAT = "moestro-routing-trace"
VERSION = 1
WEIGHT_DTYPE = torch.float8_e4m3fn  # for looking at; replay takes weights from live logits
INDEX = "trace.json"


@dataclass(frozen=True)
class Fingerprint:
    """What has to agree for a trace to fit a model; weights and dtypes may differ.

    Attributes:
        model_type: of the configuration.
        vocab_size: of the configuration, -1 if it has none.
        layers: names of the mixture layers.
        num_experts: experts to choose from, by layer.
    """

    model_type: str
    vocab_size: int
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, found: Mapping[str, FoundLayer] | None = None) -> Fingerprint:
        """The fingerprint of a transformers model."""
        layers = find_layers(model) if found is None else found
        config: Any = model.config
        counts = tuple(layer.num_experts for layer in layers.values())
        return cls(str(config.model_type), int(getattr(config, "vocab_size", -1)), tuple(layers), counts)

    def check(self, other: Fingerprint) -> None:
        """Raise ValueError naming the first thing in which another model differs."""
        for name, ours in asdict(self).items():
            theirs = getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"this trace is of another model: its {name} is {_short(ours)}, "
                    f"this model's is {_short(theirs)}"
                )


@dataclass
class LayerTrace:
    """The choices of one layer, in the order in which valid tokens met it.

    Attributes:
        index: experts by preference, `[tokens, k]` uint8, or int16 for more than 256 experts.
        weight: combine weights in 8 bits (three of mantissa), `[tokens, k]`.
        keep: choices that were carried out, `[tokens, k]` bool; None = all.
    """

    index: Tensor
    weight: Tensor
    keep: Tensor | None = None


@dataclass
class Trace:
    """What `log.record()` wrote down; complete when its block has ended.

    Attributes:
        fingerprint: of the model.
        layers: choices by layer name; empty if the trace was streamed to a folder (open it with `load_trace`).
        ids: vocabulary indices of the valid tokens of each side ("", or "encoder" and "decoder"), `[tokens]` int32;
            a side whose calls had embeddings is left out.
        folder: where it was streamed to, or None.
    """

    fingerprint: Fingerprint
    layers: dict[str, LayerTrace] = field(default_factory=dict)
    ids: dict[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the first layer saw."""
        return len(next(iter(self.layers.values())).index) if self.layers else 0

    def check_same_tokens(self, other: Trace) -> None:
        """Raise ValueError for a trace of another model or of other tokens; ids count where both have them."""
        if self.fingerprint != other.fingerprint:
            for name, ours in asdict(self.fingerprint).items():
                theirs = getattr(other.fingerprint, name)
                if ours != theirs:
                    raise ValueError(f"the traces are of two models: {name} is {_short(ours)} and {_short(theirs)}")
        if not self.layers or not other.layers:
            raise ValueError("a trace holds no token; record some text, and open a streamed trace with load_trace")
        for name, layer in self.layers.items():
            if len(layer.index) != len(other.layers[name].index):
                raise ValueError(
                    f"the traces are of {len(layer.index)} and {len(other.layers[name].index)} tokens in {name}; "
                    "record the same text twice"
                )
        for side in self.ids.keys() & other.ids.keys():
            if not torch.equal(self.ids[side], other.ids[side]):
                at = int((self.ids[side] != other.ids[side]).int().argmax())
                raise ValueError(f"the traces are of other texts: token {at} differs; record the same text twice")

    def save(self, folder: str | Path) -> Path:
        """Write to a new folder, whole or not at all.

        Raises:
            ValueError: a folder that exists, or a trace that was streamed elsewhere.
        """
        if self.folder is not None:
            raise ValueError(f"this trace was streamed to {self.folder}; copy that folder")
        with new_folder(folder) as draft:
            parts = [write_part(draft, 0, _flat(self.layers, self.ids))] if self.layers else []
            write_index(draft, self.fingerprint, parts)
        return Path(folder)


def load_trace(folder: str | Path) -> Trace:
    """Read a trace that `Trace.save` or `log.record(folder)` wrote.

    Raises:
        ValueError: no trace there, another version, or a part that is missing, cut or of the wrong shape.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no routing trace: there is no {INDEX}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{folder / INDEX} is damaged: it is not JSON") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(f"{folder / INDEX} is not a routing trace of version {VERSION}")
    about = index["fingerprint"]
    fingerprint = Fingerprint(
        about["model_type"], about["vocab_size"], tuple(about["layers"]), tuple(about["num_experts"])
    )
    pieces: dict[str, list[Tensor]] = {}
    for name, num_bytes in index["parts"].items():
        for key, piece in _read_part(folder / Path(name).name, num_bytes).items():
            pieces.setdefault(key, []).append(piece)
    layers, ids = nested({key: join_pieces(each) for key, each in pieces.items()})
    _check_layers(folder, fingerprint, layers)
    return Trace(fingerprint, {name: layers[name] for name in fingerprint.layers if layers}, ids)


def _read_part(path: Path, num_bytes: int) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"the trace lacks its part {path}")
    if path.stat().st_size != num_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes where the trace says {num_bytes}; it was cut")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _check_layers(folder: Path, fingerprint: Fingerprint, layers: Mapping[str, LayerTrace]) -> None:
    if layers and set(layers) != set(fingerprint.layers):
        raise ValueError(f"the trace in {folder} does not hold the layers that its {INDEX} names")
    for name, count in zip(fingerprint.layers, fingerprint.num_experts, strict=True):
        layer = layers.get(name)
        if layer is None:
            continue
        if layer.index.dim() != 2 or layer.index.shape != layer.weight.shape:
            raise ValueError(f"the trace of {name} in {folder} has unequal index and weight")
        if len(layer.index) and not 0 <= int(layer.index.min()) <= int(layer.index.max()) < count:
            raise ValueError(f"the trace of {name} in {folder} names experts outside 0 to {count - 1}")


def side_of(name: str) -> str:
    """`encoder` or `decoder` for a layer of one, else ""."""
    parts = name.split(".")
    return "decoder" if "decoder" in parts else "encoder" if "encoder" in parts else ""


def join_pieces(pieces: list[Tensor]) -> Tensor:
    """Tensors of successive calls as one."""
    if pieces[0].dtype == WEIGHT_DTYPE:  # torch cannot concatenate float8 on every device
        return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(WEIGHT_DTYPE)
    return torch.cat(pieces)


def _flat(layers: Mapping[str, LayerTrace], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = {f"{side}/ids": each for side, each in ids.items()}
    for name, layer in layers.items():
        flat |= {f"{name}/index": layer.index, f"{name}/weight": layer.weight}
        flat |= {} if layer.keep is None else {f"{name}/keep": layer.keep}
    return flat


def nested(flat: Mapping[str, Tensor]) -> tuple[dict[str, LayerTrace], dict[str, Tensor]]:
    """Layers and token ids from tensors by `layer/index` and the like."""
    ids = {key.removesuffix("/ids"): each for key, each in flat.items() if key.endswith("/ids")}
    names = [key.removesuffix("/index") for key in flat if key.endswith("/index")]
    layers = {
        name: LayerTrace(flat[f"{name}/index"], flat[f"{name}/weight"], flat.get(f"{name}/keep")) for name in names
    }
    return layers, ids


def write_part(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> str:
    """Write one part and answer with its name."""
    name = f"part-{number:05d}.safetensors"
    save_file({key: each.contiguous() for key, each in tensors.items()}, folder / name)
    return name


def write_index(folder: Path, fingerprint: Fingerprint, parts: list[str]) -> None:
    """Write what a trace's folder says about itself."""
    sizes = {name: (folder / name).stat().st_size for name in parts}
    about = {"format": FORMAT, "version": VERSION, "fingerprint": asdict(fingerprint), "parts": sizes}
    (folder / INDEX).write_text(json.dumps(about, indent=2) + "\n")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A draft to write into, which becomes `folder` at the end, or vanishes on an error.

    Raises:
        ValueError: a folder that exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder for the trace")
    with write_folder(folder) as draft:
        yield draft
