"""Writing a model folder as one GGUF file, a piece of a tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moestro.hf.gguf_settings import CONFIG, check_config, to_settings, tokenizer_settings
from moestro.hf.gguf_table import (
    EXPERTS,
    FRAME,
    KEY_UP,
    UP,
    VALUE_UP,
    Architecture,
    find_architecture,
    swap_rows,
)
from moestro.hf.layouts import StockFolder, find_banks, find_family
from moestro.hf.layouts.bank import Bank
from moestro.hf.layouts.relayout import Progress, beside_names

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", ".bias")
PIECE = 4_000_000  # numbers converted at once


@dataclass(frozen=True)
class Planned:
    """A tensor of the file to be: name, sizes (outermost first), type, and how to get its numbers in order."""

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Callable[[], Iterator[np.ndarray]]


class GGUFPlan:
    """A GGUF file worked out and checked, but not begun.

    Args:
        folder: the source, a folder of transformers.
        dtype: type of the matrices, one of `TYPES`; None = that of the model. Norms, routers and biases stay F32.

    Raises:
        ValueError: a family or setting that llama.cpp computes differently, a type that does not fit the sizes, an
            incomplete folder, or no byte-level tokenizer.
    """

    def __init__(self, folder: StockFolder, dtype: str | None):
        self.folder, self.config = folder, folder.config
        self.architecture = find_architecture(folder.model_type)
        check_config(self.config, self.architecture)
        family = find_family(folder.model_type, folder.tensors)
        self.layout, banks = find_banks(folder, family)
        self.dtype = _type(folder, banks, dtype)
        renamed = beside_names(folder, family, banks, "transformers")
        self.names = {new: old for old, new in renamed.items()}  # names here by those of the stock layout
        self.tensors = [*self._frame(), *self._layers(), *self._experts(banks)]
        self.tokenizer = tokenizer_settings(folder.path, self.config)
        _refuse_leftovers(self, banks)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(tensor) for tensor in self.tensors)

    def write(self, path: Path, progress: Progress) -> None:
        """Write the file; the caller moves it to where it belongs."""
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(None, self.architecture.name)
        for key, value in self._settings().items():
            _add(writer, key, value)
        for tensor in self.tensors:
            kind = GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _nbytes(tensor), raw_dtype=kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        try:
            self._write_data(writer, progress)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()

    def _write_data(self, writer: Any, progress: Progress) -> None:
        from gguf import GGMLQuantizationType, quants

        file, done, total = writer.fout[0], 0, self.nbytes
        writer.write_padding(file, file.tell())
        for tensor in self.tensors:
            for piece in tensor.pieces():
                data = quants.quantize(np.ascontiguousarray(piece), GGMLQuantizationType[tensor.kind])
                file.write(np.ascontiguousarray(data).data)
                done += data.nbytes
                progress(done, total)
            writer.write_padding(file, _nbytes(tensor))

    def _settings(self) -> dict[str, Any]:
        return {
            "general.name": self.folder.path.resolve().name,
            "general.quantization_version": 2,
            CONFIG: json.dumps(self.config, ensure_ascii=False),
            **to_settings(self.config, self.architecture),
            **self.tokenizer,
        }

    def _frame(self) -> Iterator[Planned]:
        for name, theirs in FRAME.items():
            if theirs in self.folder.tensors:
                yield self._planned(name, theirs)
            elif name == "output.weight" and self.architecture.needs_head:
                yield self._planned(name, FRAME["token_embd.weight"])

    def _layers(self) -> Iterator[Planned]:
        for layer in range(int(self.config["num_hidden_layers"])):
            ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
            for name, other in self.architecture.layer.items():
                source = self.names.get(theirs + other, theirs + other)
                if source in self.folder.tensors:
                    yield self._planned(ours + name, source)
            if self.architecture.latent:
                yield from self._latent(ours, theirs + UP)

    def _experts(self, banks: list[Bank]) -> Iterator[Planned]:
        for bank in banks:
            ours = f"blk.{bank.layer.split('.')[-2]}."
            for matrix, name in EXPERTS.items():
                shape = (bank.num_experts, *bank.shapes[matrix])
                kind = _fitting(ours + name, self.dtype, shape)
                yield Planned(ours + name, shape, kind, self._expert_pieces(bank, matrix))

    def _expert_pieces(self, bank: Bank, matrix: str) -> Callable[[], Iterator[np.ndarray]]:
        def pieces() -> Iterator[np.ndarray]:
            for expert in range(bank.num_experts):
                yield widen(bank.read(self.folder, expert)[matrix], bank.dtypes[matrix])

        return pieces

    def _planned(self, name: str, source: str) -> Planned:
        entry = self.folder.tensors[source]
        kind = "F32" if len(entry.shape) < 2 or name.endswith(ALWAYS_F32) else self.dtype
        shape = entry.shape if len(entry.shape) > 1 and entry.shape[0] > 1 else (entry.shape[-1],)

        def pieces() -> Iterator[np.ndarray]:
            order = self._order(name, shape[0])
            if order is not None:
                yield widen(self.folder.read(source), entry.dtype)[order]
                return
            row = max(1, entry.nbytes // max(1, shape[0]))
            rows = max(1, PIECE * entry.item_size // row)
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                yield self._rows(source, start * row, count * row, (count, *shape[1:]))

        return Planned(name, shape, _fitting(name, kind, shape), pieces)

    def _rows(self, source: str, start: int, nbytes: int, shape: tuple[int, ...]) -> np.ndarray:
        entry = self.folder.tensors[source]
        bits = np.frombuffer(self.folder.read_raw(source, start, nbytes), f"<u{entry.item_size}")
        return widen(bits.reshape(shape), entry.dtype)

    def _order(self, name: str, rows: int) -> list[int] | None:
        """Another order of the rows, where llama.cpp has one."""
        if not self.architecture.swapped or not name.endswith(("attn_q.weight", "attn_k.weight")):
            return None
        heads = "num_attention_heads" if name.endswith("attn_q.weight") else "num_key_value_heads"
        return swap_rows(rows, int(self.config[heads]))

    def _latent(self, ours: str, source: str) -> Iterator[Planned]:
        """The up-projection of latents, in two: keys transposed, values as they are, both by head."""
        heads, rank = int(self.config["num_attention_heads"]), int(self.config["kv_lora_rank"])
        keys, values = int(self.config["qk_nope_head_dim"]), int(self.config["v_head_dim"])

        def both() -> np.ndarray:
            whole = widen(self.folder.read(source), self.folder.tensors[source].dtype)
            return whole.reshape(heads, keys + values, rank)

        for name, shape, cut in (
            (KEY_UP, (heads, rank, keys), lambda x: x[:, :keys].transpose(0, 2, 1)),
            (VALUE_UP, (heads, values, rank), lambda x: x[:, keys:]),
        ):
            yield Planned(ours + name, shape, _fitting(ours + name, self.dtype, shape), _once(cut, both))


def _once(cut: Callable[[np.ndarray], np.ndarray], both: Callable[[], np.ndarray]) -> Any:
    return lambda: iter([cut(both())])


def widen(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 numbers that bits of F32, F16 or BF16 stand for, exactly.

    Raises:
        ValueError: another dtype.
    """
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"GGUF takes F32, F16 and BF16 models, not {dtype}")


def _type(folder: StockFolder, banks: list[Bank], dtype: str | None) -> str:
    own = next(iter(banks[0].dtypes.values()))
    chosen = own if dtype is None else dtype.upper()
    if chosen not in TYPES:
        raise ValueError(f"unknown GGUF type {dtype or own!r}; expected {', '.join(TYPES)}")
    wrong = [(name, entry.dtype) for name, entry in folder.tensors.items() if entry.dtype not in TYPES[:3]]
    if wrong:
        raise ValueError(f"{wrong[0][0]} has dtype {wrong[0][1]}; GGUF takes F32, F16 and BF16 models")
    return chosen


def _fitting(name: str, kind: str, shape: tuple[int, ...]) -> str:
    if kind.startswith("Q") and shape[-1] % 32:
        raise ValueError(
            f"{name} has rows of {shape[-1]} numbers, but {kind} takes multiples of 32; choose F16, BF16 or F32"
        )
    return kind


def _nbytes(tensor: Planned) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
    return int(np.prod(tensor.shape, dtype=np.int64)) // block * size


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _refuse_leftovers(plan: GGUFPlan, banks: list[Bank]) -> None:
    """Every tensor of the folder has a place in the file."""
    architecture: Architecture = plan.architecture
    known = set(FRAME.values()) | {name for bank in banks for name in bank.names()}
    for layer in range(int(plan.config["num_hidden_layers"])):
        theirs = [f"model.layers.{layer}.{name}" for name in (*architecture.layer.values(), UP)]
        known |= {plan.names.get(name, name) for name in theirs}
    left = sorted(set(plan.folder.tensors) - known)
    if left:
        raise ValueError(f"{left[0]} has no place in a GGUF file of {architecture.name}; moestro drops no tensor")
