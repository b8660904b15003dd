"""Turning a GGUF file back into a model folder of transformers, a piece of a tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moestro.hf.gguf_config import to_config
from moestro.hf.gguf_header import GGUFHeader, Stored, read_gguf_header
from moestro.hf.gguf_settings import TOKENIZER
from moestro.hf.gguf_table import (
    EXPERTS,
    FRAME,
    KEY_UP,
    UP,
    VALUE_UP,
    find_architecture,
    swap_rows,
)
from moestro.hf.layouts.bank import Bank, expert_shapes
from moestro.hf.layouts.header import ITEM_SIZES, read_bytes
from moestro.hf.layouts.relayout import Progress, new_tensors, write_expert, write_json
from moestro.hf.layouts.table import find_family
from moestro.hf.layouts.writer import NewTensor, ShardWriter

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PIECE = 4_000_000


class GGUFSource:
    """A GGUF file worked out as a folder of transformers and checked, but nothing written.

    Numbers that the file rounded stay rounded: what was Q8_0 becomes the bfloat16 or float32 numbers that it
    stands for.

    Args:
        path: the file.

    Raises:
        ValueError: a file that is cut or lies, an architecture that moestro does not know, or a tensor that is
            missing, one too many or mis-shaped.
    """

    def __init__(self, path: Path):
        self.header: GGUFHeader = read_gguf_header(path)
        self.config = to_config(self.header.settings, self.header.tensors, str(path))
        self.architecture = find_architecture(self.config["model_type"])
        self.dtype = self._dtype()
        self.banks = self._banks()
        self._moves = dict(self._plain())  # theirs: ours
        self._check()
        self.tensors = [*self._new_plain(), *self._new_experts()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(self, target: Path, max_shard_size: int, progress: Progress) -> None:
        """Write everything into an empty folder."""
        write_json(target / "config.json", self.config | {"dtype": _word(self.dtype)})
        self._write_tokenizer(target)
        descriptor = os.open(self.header.path, os.O_RDONLY)
        try:
            with ShardWriter(target, self.tensors, max_shard_size) as writer:
                done = 0
                for count in self._write_all(writer, descriptor):
                    done += count
                    progress(done, self.nbytes)
        finally:
            os.close(descriptor)

    def _dtype(self) -> str:
        """That of the model it came from, or of its matrices; rounded ones become float32."""
        known = DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype")))
        if known:
            return known
        kinds = {
            self._kind(tensor) for name, tensor in self.header.tensors.items() if name.endswith("_exps.weight")
        }
        return kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES.values()) else "F32"

    def _kind(self, tensor: Stored) -> str:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(tensor.kind).name

    def _banks(self) -> list[Bank]:
        family = find_family(self.config["model_type"], {})
        hidden = int(self.config[family.stacks[0].hidden])
        shapes = expert_shapes(int(self.config[family.width]), hidden, gated=True, biased=False)
        counts = [self.config.get(key) for key in (family.experts, "num_local_experts", "num_experts")]
        number = int(next(count for count in counts if count is not None))
        store, dtypes = family.stores["transformers"], dict.fromkeys(shapes, self.dtype)
        layers = [i for i in range(self._layers) if f"blk.{i}.{EXPERTS['gate']}" in self.header.tensors]
        return [Bank(f"model.layers.{i}.", store, number, 0, shapes, dtypes) for i in layers]

    @property
    def _layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def _plain(self) -> Iterator[tuple[str, str]]:
        """Names there and here, of everything but experts and split latents."""
        here = self.header.tensors
        for ours, theirs in FRAME.items():
            tied = ours == "output.weight" and self.config.get("tie_word_embeddings", ours not in here)
            if ours in here and not tied:
                yield theirs, ours
        for layer in range(self._layers):
            for ours, theirs in self.architecture.layer.items():
                if f"blk.{layer}.{ours}" in here:
                    yield f"model.layers.{layer}.{theirs}", f"blk.{layer}.{ours}"

    def _check(self) -> None:
        """Every tensor is known, and no layer lacks what its experts need."""
        here, where = self.header.tensors, self.header.path
        if "output.weight" not in here:
            self.config["tie_word_embeddings"] = True
        known = {*self._moves.values(), "output.weight"}
        for bank in self.banks:
            for matrix, name in EXPERTS.items():
                self._check_shape(_layer(bank, name), (bank.num_experts, *bank.shapes[matrix]))
                known.add(_layer(bank, name))
            router = (bank.num_experts, int(self.config["hidden_size"]))
            self._check_shape(_layer(bank, "ffn_gate_inp.weight"), router)
        if self.architecture.latent:
            known |= {f"blk.{i}.{name}" for i in range(self._layers) for name in (KEY_UP, VALUE_UP)}
        if not self.banks:
            raise ValueError(f"{where} has no layer with experts")
        vocabulary = (int(self.config["vocab_size"]), int(self.config["hidden_size"]))
        self._check_shape("token_embd.weight", vocabulary)
        self._check_shape("output_norm.weight", vocabulary[1:])
        for layer in range(self._layers):
            self._check_shape(f"blk.{layer}.attn_norm.weight", vocabulary[1:])
        left = sorted(set(here) - known)
        if left:
            raise ValueError(f"{where} holds {left[0]}, which a {self.config['model_type']} does not have")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.header.tensors:
            raise ValueError(f"{self.header.path} lacks {name}")
        actual = self.header.tensors[name].shape
        if actual != shape:
            raise ValueError(f"{name} has shape {list(actual)} but the settings describe {list(shape)}")

    def _new_plain(self) -> Iterator[NewTensor]:
        for theirs, ours in self._moves.items():
            yield NewTensor(theirs, self.dtype, self._shape(theirs, ours))
        if self.architecture.latent:
            heads, rank = int(self.config["num_attention_heads"]), int(self.config["kv_lora_rank"])
            rows = heads * (int(self.config["qk_nope_head_dim"]) + int(self.config["v_head_dim"]))
            for layer in range(self._layers):
                yield NewTensor(f"model.layers.{layer}.{UP}", self.dtype, (rows, rank))

    def _shape(self, theirs: str, ours: str) -> tuple[int, ...]:
        shape = self.header.tensors[ours].shape
        return (1, *shape) if theirs.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape

    def _new_experts(self) -> Iterator[NewTensor]:
        for bank in self.banks:
            for slot in bank.store.form:
                yield from new_tensors(bank, slot)

    def _write_all(self, writer: ShardWriter, file: int) -> Iterator[int]:
        for theirs, ours in self._moves.items():
            yield from self._write_plain(writer, file, theirs, self.header.tensors[ours], ours)
        if self.architecture.latent:
            for layer in range(self._layers):
                yield self._write_latent(writer, file, layer)
        for bank in self.banks:
            for expert in range(bank.num_experts):
                matrices = {
                    matrix: self._narrow(self._part(file, self.header.tensors[_layer(bank, name)], expert))
                    for matrix, name in EXPERTS.items()
                }
                yield write_expert(writer, bank, expert, matrices)

    def _write_plain(self, writer: ShardWriter, file: int, theirs: str, tensor: Stored, ours: str) -> Iterator[int]:
        if self.architecture.swapped and ours.endswith(("attn_q.weight", "attn_k.weight")):
            key = "num_attention_heads" if ours.endswith("attn_q.weight") else "num_key_value_heads"
            order = np.argsort(swap_rows(tensor.shape[0], int(self.config[key])))
            whole = self._narrow(self._rows(file, tensor, 0, tensor.shape[0])[order])
            writer.write(theirs, np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data)
            yield whole.nbytes
            return
        flat = Stored(tensor.kind, tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape), *_place(tensor))
        count = max(1, PIECE // max(1, flat.shape[-1]))
        start = 0
        for row in range(0, flat.shape[0], count):
            piece = self._narrow(self._rows(file, flat, row, min(count, flat.shape[0] - row)))
            writer.write(theirs, np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data, start)
            start += piece.nbytes
            yield piece.nbytes

    def _write_latent(self, writer: ShardWriter, file: int, layer: int) -> int:
        keys, values = (self.header.tensors[f"blk.{layer}.{name}"] for name in (KEY_UP, VALUE_UP))
        parts = [self._heads(file, keys).transpose(0, 2, 1), self._heads(file, values)]
        whole = self._narrow(np.concatenate(parts, axis=1))
        writer.write(f"model.layers.{layer}.{UP}", np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data)
        return whole.nbytes

    def _heads(self, file: int, tensor: Stored) -> np.ndarray:
        return np.stack([self._part(file, tensor, head) for head in range(tensor.shape[0])])

    def _part(self, file: int, tensor: Stored, index: int) -> np.ndarray:
        """One expert, or one head, of a stacked tensor."""
        nbytes = tensor.nbytes // tensor.shape[0]
        part = Stored(tensor.kind, tensor.shape[1:], tensor.start + index * nbytes, nbytes)
        return self._rows(file, part, 0, part.shape[0])

    def _rows(self, file: int, tensor: Stored, row: int, count: int) -> np.ndarray:
        """Rows of a matrix as float32."""
        from gguf import GGMLQuantizationType, quants

        size = tensor.nbytes // tensor.shape[0]
        data = np.frombuffer(read_bytes(file, tensor.start + row * size, count * size, self.header.path), np.uint8)
        numbers = quants.dequantize(data.reshape(count, size), GGMLQuantizationType(tensor.kind))
        return numbers.reshape(count, *tensor.shape[1:])

    def _narrow(self, numbers: np.ndarray) -> np.ndarray:
        """The bits of float32 numbers in the dtype of the folder."""
        from gguf import GGMLQuantizationType, quants

        if self.dtype == "F32":
            return numbers.view(np.uint32)
        if self.dtype == "F16":
            return numbers.astype(np.float16).view(np.uint16)
        bits = quants.quantize(np.ascontiguousarray(numbers), GGMLQuantizationType.BF16)
        assert ITEM_SIZES[self.dtype] == 2
        return bits.view(np.uint16).reshape(numbers.shape)

    def _write_tokenizer(self, target: Path) -> None:
        content = self.header.settings.get(TOKENIZER)
        if isinstance(content, str):
            (target / "tokenizer.json").write_text(content, encoding="utf-8")


def _layer(bank: Bank, name: str) -> str:
    return f"blk.{bank.layer.split('.')[-2]}.{name}"


def _place(tensor: Stored) -> tuple[int, int]:
    return tensor.start, tensor.nbytes


def _word(dtype: str) -> Any:
    return next(word for word, code in DTYPES.items() if code == dtype)
